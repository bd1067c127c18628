"""`python -m export.audit FILE_OR_BUNDLE`: print what really runs, and exit with 1 if a file exceeds a limit."""

import argparse
import sys
from pathlib import Path

from export.bundle.read import read_bundle
from export.bundle.sandbox import require_sound, vet
from export.command.arguments import at_least
from export.command.files import json_text, write_text
from export.command.main import run
from export.command.table import table
from export.onnx_file.model_file import parse, precision
from export.proof.audit import AUDITED, Audit, audit, over_limits
from export.runtime.node_times import node_times

SLOWEST = 15  # nodes that `--times` lists


def as_text(found: Audit) -> str:
    """Return the audit as lines for a terminal."""
    total = len(found["integer_layers"]) + len(found["float_layers"])
    part = "unknown" if found["float_fraction"] is None else f"{found['float_fraction']:.2%}"
    counts = [
        (provider, operator, str(n)) for provider, kinds in found["providers"].items() for operator, n in kinds.items()
    ]
    lines = [
        f"{len(found['integer_layers'])} of {total} layers run in integers; {part} of the multiply-accumulates in float; "
        f"{found['float_initializer_mb']:.2f} MB of FP32 constants",
        table(("provider", "operator", "nodes"), counts),
    ]
    for title, names in (
        ("layers in float", [_with_reason(found, name) for name in found["float_layers"]]),
        (
            "float operators",
            [_with_reason(found, name, f" ({kind})") for name, kind in found["float_operators"].items()],
        ),
        ("leftover Q/DQ", [_with_reason(found, name) for name in found["leftover_qdq"]]),
        ("float biases", found["float_biases"]),
        ("float weights that ONNX Runtime quantizes itself, on the full range", found["quantized_by_runtime"]),
        ("copies between providers", found["copies"]),
    ):
        lines.extend([f"{title}: {len(names)}", *(f"  {name}" for name in names)] if names else [])
    return "\n".join(lines)


def _with_reason(found: Audit, name: str, kind: str = "") -> str:
    reason = found["reasons"].get(name)
    return f"{name}{kind}: {reason}" if reason else f"{name}{kind}"


def slowest(path: Path, provider: str) -> str:
    """Return a table of the slowest nodes: one thread, one image, the median of nine runs after a warm-up."""
    times = sorted(
        node_times(parse(path).SerializeToString(), provider=AUDITED[provider], runs=10),
        key=lambda node: -node.milliseconds,
    )
    total = sum(node.milliseconds for node in times)
    cells = [
        (node.name, node.operator, node.provider, node.milliseconds, f"{node.milliseconds / total:.1%}")
        for node in times[:SLOWEST]
    ]
    return table(("node", "operator", "provider", "ms", "fraction"), cells)


def print_audits(arguments: argparse.Namespace) -> int:
    """Print each file's audit; return 1 if a file exceeds a limit."""
    over: list[str] = []
    path: Path = arguments.path
    files = read_bundle(path, inspect=vet).files if path.is_dir() else {path.stem: require_sound(path)}
    audits = {name: audit(file, arguments.provider) for name, file in files.items()}
    for name, found in audits.items():
        sys.stdout.write(f"{name}\n{as_text(found)}\n")
        if arguments.times:
            sys.stdout.write(f"{slowest(files[name], arguments.provider)}\n")
        sys.stdout.write("\n")
        if path.is_dir() and precision(parse(files[name])) != "int8":
            continue  # a bundle's float files are float on purpose
        over.extend(
            f"{name}: {sentence}"
            for sentence in over_limits(
                found,
                max_float_layers=arguments.max_float_layers,
                max_float_fraction=arguments.max_float_fraction,
                max_leftover_qdq=arguments.max_leftover_qdq,
            )
        )
    if arguments.json:
        write_text(arguments.json, json_text(audits))
    sys.stderr.write("".join(f"{sentence}\n" for sentence in over))
    return 1 if over else 0


def main() -> int:
    """Show the graph that ONNX Runtime runs for a file, or for each file of a bundle, on this machine."""
    parser = argparse.ArgumentParser(prog="python -m export.audit", description=main.__doc__)
    parser.add_argument("path", type=Path, metavar="FILE_OR_BUNDLE")
    parser.add_argument("--provider", choices=AUDITED, default="cpu")
    parser.add_argument(
        "--max-float-layers", type=at_least(0), metavar="N", help="exit with 1 if more layers run in float"
    )
    parser.add_argument(
        "--max-float-fraction", type=float, metavar="FRACTION", help="the same for the fraction of the MACs, 0 to 1"
    )
    parser.add_argument(
        "--max-leftover-qdq", type=at_least(0), metavar="N", help="the same for Q/DQ nodes inside the graph"
    )
    parser.add_argument("--times", action="store_true", help="also list the slowest nodes")
    parser.add_argument("--json", type=Path, help="also write the audits to this file")
    return run(parser, print_audits)


if __name__ == "__main__":
    sys.exit(main())
