"""`python -m export.gate BUNDLE`: fail a build whose bundle is worse than the accepted one."""

import argparse
import sys
from pathlib import Path

from export.command.files import write_text
from export.command.main import run
from export.command.table import print_live
from export.errors import BundleError
from export.gate.checks import EXIT_CODES, Limits
from export.gate.commands import BASELINES, judge, update
from export.gate.latency import Plan
from export.gate.outputs import as_json, as_junit, as_text
from export.gate.run import Terms
from export.gate.subject import BrokenBundleError
from export.runtime.own import open_metric
from export.runtime.providers import add_arguments, asked

EXITS = "exit code 0: pass, 1: regression, 2: this run cannot tell, 3: broken bundle"


def main() -> int:
    """Judge a bundle against this machine's baseline or an older bundle, or accept it as the baseline."""
    return run(parser(), judge_or_accept)


def judge_or_accept(arguments: argparse.Namespace) -> int:
    """Print the verdict, or the path of the new baseline, and return the exit code."""
    limits = Limits(
        max_latency_ratio=None if arguments.no_latency else arguments.max_latency_ratio,
        min_score_ratio=None if arguments.no_accuracy else arguments.min_score_ratio,
        max_size_ratio=arguments.max_size_ratio,
    )
    plan = Plan(
        seconds=arguments.seconds,
        blocks=arguments.blocks,
        looks=arguments.looks,
        threads=arguments.threads,
        batch=arguments.batch,
        runs_in=asked(arguments),
    )
    own = None
    if arguments.score is not None:
        if Path(arguments.score).resolve().is_relative_to(arguments.bundle.resolve()):
            raise BundleError(
                f"--score: {arguments.score} is in the bundle, whose code is never run: give a file of your own"
            )
        own = open_metric(arguments.score)
    terms = Terms(arguments.data, limits, plan, own, arguments.file, print_live)
    if arguments.update_baseline:
        try:
            place, notes = update(
                arguments.bundle,
                arguments.baseline or BASELINES,
                terms,
                notice=lambda sentence: print(sentence, file=sys.stderr, flush=True),  # noqa: T201
            )
        except BrokenBundleError as error:
            sys.stderr.write(f"{arguments.bundle}: {error}\n")
            return EXIT_CODES["broken"]
        print_live("")
        sys.stdout.write("".join(f"note: {note}\n" for note in notes))
        sys.stdout.write(f"recorded {arguments.bundle} in {place}: commit it\n")
        return 0
    baseline = arguments.baseline or (None if arguments.against else BASELINES)
    verdict = judge(arguments.bundle, baseline, terms, against=arguments.against)
    print_live("")
    sys.stdout.write(f"{as_text(verdict)}\n")
    for path, text in ((arguments.junit, as_junit), (arguments.json, as_json)):
        if path:
            write_text(path, text(verdict))
    return verdict.exit_code


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(prog="python -m export.gate", description=main.__doc__, epilog=EXITS)
    found.add_argument("bundle", type=Path)
    found.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help=f"a baseline, or a folder with one for each machine (default {BASELINES})",
    )
    found.add_argument("--update-baseline", action="store_true", help="record the bundle as this machine's baseline")
    found.add_argument("--against", type=Path, metavar="OLD_BUNDLE", help="time the new file beside this bundle's")
    found.add_argument(
        "--data",
        type=Path,
        help="a folder of class folders, or an .npz file (default: the data that the baseline names)",
    )
    found.add_argument(
        "--score",
        metavar="FILE.py:FUNCTION",
        help="also judge by your own metric, from one image's output and its path to a number; its code runs",
    )
    found.add_argument("--max-latency-ratio", type=float, default=Limits.max_latency_ratio, metavar="1.05")
    found.add_argument("--no-latency", action="store_true", help="do not judge latency, as on a shared machine")
    found.add_argument("--min-score-ratio", type=float, default=Limits.min_score_ratio, metavar="0.995")
    found.add_argument("--no-accuracy", action="store_true", help="do not judge accuracy, if there are no images")
    found.add_argument(
        "--max-size-ratio",
        type=float,
        default=Limits.max_size_ratio,
        metavar="1.01",
        help="for file size and for multiply-accumulates",
    )
    found.add_argument("--seconds", type=float, default=Plan.seconds, help="time for each file in each look")
    found.add_argument("--blocks", type=int, default=Plan.blocks, help="interleaved blocks in each look")
    found.add_argument(
        "--looks",
        type=int,
        default=Plan.looks,
        help="at most; looks are added until the result is clear",
    )
    found.add_argument(
        "--threads", type=int, default=Plan.threads, help="CPU threads; without --against, as the baseline was timed"
    )
    found.add_argument("--batch", type=int, default=Plan.batch, help="images per run; likewise")
    found.add_argument("--file", metavar="NAME", help="the file to judge, by default the one that the bundle serves")
    add_arguments(found)
    found.add_argument("--junit", type=Path, help="also write the checks as JUnit XML")
    found.add_argument("--json", type=Path, help="also write as_json")
    return found


if __name__ == "__main__":
    sys.exit(main())
