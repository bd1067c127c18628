"""The verdict as text for a terminal, as JUnit XML for a CI, and whole as JSON."""

from dataclasses import asdict
from xml.etree import ElementTree

from export.command.files import json_text
from export.command.table import table
from export.gate.checks import EXIT_CODES, Check, Status, Verdict

HEADER = ("check", "verdict", "baseline", "now", "limit")
CONCLUSIONS: dict[Status, str] = {
    "pass": "pass: nothing is worse than the baseline",
    "skipped": "pass: nothing is worse than the baseline",
    "unexplained": "unexplained: better than the baseline without a reason",
    "inconclusive": "inconclusive: this run cannot tell",
    "fail": "fail: worse than the baseline",
    "broken": "broken: not a bundle that can be served",
}


def as_text(verdict: Verdict) -> str:
    """Return a table, a line for each check with details, the notes, and the conclusion."""
    deciding = ", ".join(check.name for check in verdict.checks if EXIT_CODES[check.status])
    return "\n".join([
        verdict.title,
        table(HEADER, [(one.name, one.status, one.was, one.now, one.limit) for one in verdict.checks]),
        "",
        *(f"{check.name}: {check.detail}" for check in verdict.checks if check.detail),
        *(f"note: {note}" for note in verdict.notes),
        CONCLUSIONS[verdict.status] + (f" ({deciding})" if deciding else ""),
    ])  # fmt: skip


def as_junit(verdict: Verdict) -> str:
    """Return a test suite with a case for each check: a regression is a failure, an inconclusive check an error."""
    suite = ElementTree.Element("testsuite", name=f"compression gate: {printable(verdict.title)}")
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for check in verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="export.gate", name=check.name)
        if (kind := junit_kind(check)) is not None:
            counts[kind] += 1
            message = printable(f"{check.status}: {check.detail}" if check.detail else check.status)
            ElementTree.SubElement(case, kind, message=message).text = printable(
                f"baseline {check.was}, now {check.now}, limit {check.limit}"
            )
    suite.attrib.update(tests=str(len(verdict.checks)), failures=str(counts["failure"]), errors=str(counts["error"]))
    suite.set("skipped", str(counts["skipped"]))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def junit_kind(check: Check) -> str | None:
    """Return JUnit's element for a check, None if it passed."""
    if check.status == "skipped":
        return "skipped"
    return {0: None, 1: "failure"}.get(EXIT_CODES[check.status], "error")


def as_json(verdict: Verdict) -> str:
    """Return the whole verdict as JSON."""
    return json_text({"status": verdict.status, "exit_code": verdict.exit_code, **asdict(verdict)})


def printable(text: str) -> str:
    """Return the text without characters that XML cannot hold; names in untrusted files may have any."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
