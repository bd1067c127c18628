"""The checks that never flake: they compare facts of the files, not measurements."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from export.errors import first
from export.gate.baseline import Baseline
from export.gate.checks import Check, Limits
from export.gate.facts import Facts
from export.names import LABELS, PREPROCESS


@dataclass(frozen=True)
class Property:
    """A property compared for every file: how to show it, and a sentence if a file got worse, else an empty string."""

    name: str
    limit: str
    show: Callable[[Facts], str]
    worse: Callable[[Facts, Facts], str]


def hard_checks(was: Baseline, now: Baseline, limits: Limits, *, same_graph: bool) -> Iterator[Check]:
    """Yield one check for each property over all files of the baseline.

    `same_graph`: both were optimized by the same ONNX Runtime on the same machine, so their operators are comparable.
    """
    yield same("classes", differing_lines(was.classes, now.classes), LABELS)
    yield same("preprocessing", differing_keys(was.preprocess, now.preprocess), PREPROCESS)
    yield files_check(was, now)
    pairs = {name: (facts, now.files[name]) for name, facts in was.files.items() if name in now.files}
    for one in properties(limits):
        bad = [f"{name}: {sentence}" for name, (old, new) in pairs.items() if (sentence := one.worse(old, new))]
        before, after = was.files[was.served], now.files.get(was.served)
        shown = one.show(before), one.show(after) if after else "missing"
        if one.name == "operators" and not same_graph:
            yield Check(one.name, "skipped", *shown, detail="optimized by another ONNX Runtime or for another machine")
        else:
            yield Check(one.name, "fail" if bad else "pass", *shown, one.limit, "; ".join(bad))


def properties(limits: Limits) -> Sequence[Property]:
    """Return the properties to compare, in the order of the report."""

    def grown(old: int | None, new: int | None) -> str:
        if old is None or new is None:
            return "" if old == new else f"was {old}, is {new}"
        return f"was {old:,}, is {new:,}: {new / old:.3f} times" if new > old * limits.max_size_ratio else ""

    def of_layers(one: Facts) -> str:
        return f"{len(one.integer_layers)} of {len(one.integer_layers) + len(one.float_layers)}"

    def stay(old: Facts, new: Facts) -> str:
        return more("stay in the optimized graph", old.leftover_qdq, new.leftover_qdq)

    def saturate(old: Facts, new: Facts) -> str:
        return more("can saturate on a CPU without VNNI", old.can_saturate, new.can_saturate)

    def other(old: Facts, new: Facts) -> str:
        return "" if old.precision == new.precision else f"was {old.precision}, is {new.precision}"

    def macs(one: Facts) -> str:
        return "unknown" if one.macs is None else f"{one.macs / 1e6:,.2f} M"

    growth = f"{limits.max_size_ratio:.3f} times"
    return (
        Property("size", growth, lambda one: f"{one.bytes / 1e6:.3f} MB", lambda old, new: grown(old.bytes, new.bytes)),
        Property("MACs", growth, macs, lambda old, new: grown(old.macs, new.macs)),
        Property("precision", "the same", lambda one: one.precision, other),
        Property("opset, IR", "no newer", lambda one: f"{one.opset}, {one.ir_version}", newer),
        Property("integer layers", "none lost", of_layers, lost_integers),
        Property("Q/DQ inside", "no more", lambda one: str(len(one.leftover_qdq)), stay),
        Property("can saturate", "no more", lambda one: str(len(one.can_saturate)), saturate),
        Property("operators", "none added", lambda one: str(sum(one.operators.values())), more_operators),
    )


def newer(old: Facts, new: Facts) -> str:
    """Return a sentence if older servers can no longer read the file."""
    if new.opset <= old.opset and new.ir_version <= old.ir_version:
        return ""
    return f"was opset {old.opset}, IR {old.ir_version}, is opset {new.opset}, IR {new.ir_version}: older servers cannot read it"


def lost_integers(old: Facts, new: Facts) -> str:
    """Name the layers that were integer and are float now; if names differ, the float layers that are new."""
    lost = [name for name in new.float_layers if name in old.integer_layers]
    if not lost and len(new.float_layers) > len(old.float_layers):
        lost = [name for name in new.float_layers if name not in old.float_layers] or new.float_layers
    return f"{first(lost)} run in float now" if lost else ""


def more(what: str, old: Sequence[str], new: Sequence[str]) -> str:
    """Name what is new in a list, if the list has grown."""
    return f"{first([name for name in new if name not in old])} {what} now" if len(new) > len(old) else ""


def more_operators(old: Facts, new: Facts) -> str:
    """Return the changed operator counts if any grew; fewer operators are no regression."""
    changes = {kind: new.operators.get(kind, 0) - old.operators.get(kind, 0) for kind in old.operators | new.operators}
    if all(change <= 0 for change in changes.values()):
        return ""
    return ", ".join(f"{change:+d} {kind}" for kind, change in sorted(changes.items()) if change)


def files_check(was: Baseline, now: Baseline) -> Check:
    """Check that every file of the baseline is there, and the same file is served."""
    gone, come = sorted(was.files.keys() - now.files.keys()), sorted(now.files.keys() - was.files.keys())
    parts = [f"{name} is gone" for name in gone]
    if now.served != was.served:
        parts.append(f"{now.served} is served in place of {was.served}")
    detail = "; ".join([*parts, *(f"{name} is new" for name in come)])
    return Check("files", "fail" if parts else "pass", str(len(was.files)), str(len(now.files)), "none lost", detail)


def same(name: str, differences: Sequence[str], file: str) -> Check:
    """Return the check that a file's content is the same."""
    if not differences:
        return Check(name, "pass", limit="the same")
    return Check(name, "fail", limit="the same", detail=f"{file}: {first(differences)}")


def differing_lines(was: Sequence[str], now: Sequence[str]) -> list[str]:
    """Return the differences between two lists of classes."""
    if len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True), 1)
        return [f"line {line} was {old!r}, is {new!r}" for line, (old, new) in pairs if old != new]
    lost = [f"{name!r} is gone" for name in was if name not in now]
    return [f"had {len(was)} classes, has {len(now)}", *lost, *(f"{name!r} is new" for name in now if name not in was)]


def differing_keys(was: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return the keys whose values differ."""
    keys = sorted(was.keys() | now.keys())
    return [f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys if was.get(key) != now.get(key)]
