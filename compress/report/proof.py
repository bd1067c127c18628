"""What the page and the terminal say about the INT8 files: do they answer as the trained network, and what runs in integers."""

from typing import NamedTuple

from compress.report.gain import stage_section
from compress.report.numbers import UNKNOWN, heading, percent, points, significant
from compress.report.parity import allowed
from compress.report.shape import AuditRow, Report, TensorRow, VerifyRow
from compress.report.verdict import TOLERANCE, deployed_name
from export.onnx_file.roles import PTQ, QAT, is_int8


class Fact(NamedTuple):
    """One measurement in words; `met` is None where no limit speaks of it."""

    met: bool | None
    title: str
    value: str
    note: str


class Tensor(NamedTuple):
    """One tensor's distance from the reference, in words."""

    name: str
    snr: str
    max_lsb: str
    mean_lsb: str
    differing: str
    own_lsb: str


class Parity(NamedTuple):
    """One INT8 file against its reference; `alarm` speaks of saturation that happened."""

    name: str
    facts: list[Fact]
    alarm: str | None
    tensors: list[Tensor]


class Named(NamedTuple):
    """A list of names for one line of the audit, each with a reason or nothing."""

    title: str
    names: list[tuple[str, str]]


class Graph(NamedTuple):
    """One INT8 file as ONNX Runtime's optimizer left it."""

    name: str
    provider: str
    facts: list[Fact]
    operators: str
    lists: list[Named]
    integer: Named


def parities(report: Report) -> list[Parity]:
    """Return each verified file's parity, the deployed file first."""
    found = report["verify"] or {}
    return [
        Parity(
            name,
            _parity_facts(report, name, row),
            _alarm(row),
            [_tensor(tensor) for tensor in sorted(row["tensors"], key=_worst_first)],
        )
        for name, row in sorted(found.items(), key=lambda item: _order(item[0]))
    ]


def graphs(report: Report) -> list[Graph]:
    """Return each INT8 file's audit, the deployed file first."""
    found = {name: row for name, row in (report["audit"] or {}).items() if is_int8(name)}
    return [
        Graph(
            name,
            row["provider"].upper(),
            _audit_facts(report, name, row),
            ", ".join(f"{count} {operator}" for operator, count in _by_count(row["operators"])),
            [named for named in _lists(row) if named.names],
            Named(f"{len(row['integer_layers']):,} layers in integers", [(name, "") for name in row["integer_layers"]]),
        )
        for name, row in sorted(found.items(), key=lambda item: _order(item[0]))
    ]


def _parity_facts(report: Report, name: str, row: VerifyRow) -> list[Fact]:
    low, high = (percent(bound) for bound in row["agreement_ci95"])
    is_network = name.startswith(QAT)
    reference = "the fake-quantized network" if is_network else "the same file without the optimizer"
    wanted = _limit(report, name, "min_agreement")
    facts = [
        Fact(
            None if wanted is None else row["agreement"] >= wanted - TOLERANCE,
            "Agreement",
            percent(row["agreement"]),
            f"answers as {reference} on {row['images']:,} images, exact 95 % interval {low} to {high}"
            + ("" if wanted is None else f"; at least {percent(wanted)} wanted"),
        )
    ]
    if row["score"] is not None and row["score_reference"] is not None:
        difference = row["score"] - row["score_reference"]
        most, words = allowed(row["images"])
        note = (
            f"{'PyTorch' if is_network else 'unoptimized'} {percent(row['score_reference'])}, "
            f"ONNX Runtime {percent(row['score'])}; at most {words} wanted"
        )
        met = abs(difference) <= most + TOLERANCE
        facts.append(
            Fact(
                met,
                f"{heading(report['metric']['title'])} against {'PyTorch' if is_network else 'unoptimized'}",
                points(difference),
                note,
            )
        )
    compared = f"{len(row['tensors']):,} tensors compared on {row['tensor_images']:,} images, each layer on its own"
    facts.append(Fact(None, "First divergence", row["first_divergence"] or "none", compared))
    if not row["saturation"]:
        possible = len(row["saturation_possible"])
        value = "none found" if possible else "impossible on this grid"
        note = f"possible in {possible} {'layer' if possible == 1 else 'layers'}" if possible else ""
        facts.append(Fact(True, "Saturation", value, note))
    return facts


def _alarm(row: VerifyRow) -> str | None:
    """Return which layers saturate on the machine that verified the file."""
    if not row["saturation"]:
        return None
    worst = sorted(row["saturation"], key=lambda layer: -layer["max_lsb"])
    layers = ", ".join(f"{layer['layer']} (up to {layer['max_lsb']:,} LSB)" for layer in worst)
    return f"16-bit sums saturate on this machine, so the file answers wrongly here: {layers}."


def _tensor(row: TensorRow) -> Tensor:
    snr = UNKNOWN if row["differing"] else "identical"
    return Tensor(
        row["name"],
        snr if row["snr_db"] is None else f"{row['snr_db']:.1f} dB",
        f"{row['max_lsb']:,}",
        significant(row["mean_lsb"], digits=2),
        percent(row["differing"]),
        f"{row['local']['max_lsb']:,}",
    )


def _worst_first(row: TensorRow) -> tuple[float, int]:
    unknown = 0.0 if row["differing"] else float("inf")  # identical, unless the reference is all zeros
    return (unknown if row["snr_db"] is None else row["snr_db"], -row["max_lsb"])


def _audit_facts(report: Report, name: str, row: AuditRow) -> list[Fact]:
    def judged(title: str, key: str, value: float | None, shown: str) -> Fact:
        wanted = _limit(report, name, key)
        if wanted is None:
            return Fact(None, title, shown, "")
        met = value is not None and value <= wanted + TOLERANCE
        return Fact(met, title, shown, f"at most {percent(wanted) if key == 'max_float_fraction' else f'{wanted:g}'}")

    floats, left, part = len(row["float_layers"]), len(row["leftover_qdq"]), row["float_fraction"]
    return [
        Fact(None, "Integer layers", f"{len(row['integer_layers']):,}", ""),
        judged("Float layers", "max_float_layers", floats, f"{floats:,}"),
        judged("MACs in float", "max_float_fraction", part, percent(part)),
        judged("Leftover Q/DQ", "max_leftover_qdq", left, f"{left:,}"),
        Fact(None, "Float biases", f"{len(row['float_biases']):,}", ""),
        Fact(None, "FP32 constants", significant(row["float_initializer_mb"], "MB"), ""),
        Fact(None, "Copies", f"{len(row['copies']):,}", ""),
    ]


def _lists(row: AuditRow) -> list[Named]:
    reasons = row["reasons"]
    return [
        Named("Layers in float", [(name, reasons.get(name, "")) for name in row["float_layers"]]),
        Named(
            "Other operators in float",
            [
                (name, " · ".join(part for part in (operator, reasons.get(name, "")) if part))
                for name, operator in row["float_operators"].items()
            ],
        ),
        Named("Leftover Q/DQ", [(name, reasons.get(name, "")) for name in row["leftover_qdq"]]),
        Named("Float biases", [(name, "") for name in row["float_biases"]]),
        Named("Copies", [(name, "") for name in row["copies"]]),
    ]


def _limit(report: Report, name: str, key: str) -> float | None:
    """Return one of the export stage's limits, which speak of the deployed file alone."""
    section = stage_section(report, "export")
    if section is None or name != _deployed_int8(report):
        return None
    limit: float | None = section["limits"][key]
    return limit


def _deployed_int8(report: Report) -> str | None:
    names = report["audit"] or {}
    return deployed_name(report) or next((name for name in (QAT, PTQ) if name in names), None)


def _by_count(operators: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(operators.items(), key=lambda item: (-item[1], item[0]))


def _order(name: str) -> tuple[int, str]:
    return ((QAT, PTQ).index(name) if name in (QAT, PTQ) else 2, name)
