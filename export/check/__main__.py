"""`python -m export.check BUNDLE`: list all problems at once; exit code 0: none, 3: a broken bundle."""

import argparse
import sys
from pathlib import Path

from export.check.findings import Problem, check_bundle
from export.command.main import run
from export.runtime.providers import add_arguments, asked

BROKEN = 3  # exit code


def as_text(path: Path, findings: list[Problem]) -> str:
    """Return a line for each finding, or one if there are none."""
    if not findings:
        return f"{path}: no problems found\n"
    return "".join(f"{finding.defect}: {finding.sentence}\n" for finding in findings)


def print_findings(arguments: argparse.Namespace) -> int:
    """Print a line for each finding."""
    _, findings = check_bundle(arguments.bundle, asked(arguments))
    sys.stdout.write(as_text(arguments.bundle, findings))
    return BROKEN if findings else 0


def main() -> int:
    """List all problems of a bundle; exit with 3 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m export.check", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    add_arguments(parser)
    return run(parser, print_findings)


if __name__ == "__main__":
    sys.exit(main())
