"""Compare every file's score in ONNX Runtime with what its network's stage measured: export must lose nothing."""

from collections.abc import Iterator

from compress.recipe.order import GIVES
from compress.report.judge.gain import stage_metrics
from compress.report.judge.verdict import TOLERANCE, any_row, target_of
from compress.report.numbers import percent
from compress.report.shape import Report
from export.onnx_file.roles import FP32, PTQ, QAT, TEACHER
from export.onnx_file.targets import RUNS

MAX_SCORE_DIFFERENCE = 0.002  # between PyTorch and ONNX Runtime: 0.2 points, or one image if that is more


def allowed(images: int) -> tuple[float, str]:
    """Return the largest allowed difference of two runtimes' scores on the same images, as a number and in words."""
    least = 1 / images
    return (least, "one image") if least > MAX_SCORE_DIFFERENCE else (MAX_SCORE_DIFFERENCE, "0.2 points")


def mismatches(report: Report) -> list[str]:
    """Return a sentence for each file whose score differs from its stage's by more than parity allows."""
    sentences = []
    for name, stage, wanted in _measured(report):
        row = any_row(report, name)
        if row is None or row["score"] is None or not row["images"]:
            continue
        most, words = allowed(row["images"])
        if abs(row["score"] - wanted) > most + TOLERANCE:
            sentences.append(
                f"{name}: score is {percent(row['score'])} in ONNX Runtime, but its stage ({stage}) measured {percent(wanted)} on the "
                f"same {row['images']:,} images (at most {words} apart is allowed): this is not the network that was measured, do not serve it"
            )
    return sentences


def _measured(report: Report) -> Iterator[tuple[str, str, float]]:
    """Yield each file's name, the stage that measured its network on the whole validation set, and the score."""
    floats = [row for row in report["stages"] if GIVES[row["stage"]] == "float"]
    for name, rows in ((TEACHER, floats[:1]), (FP32, floats[-1:])):
        yield from ((name, row["stage"], score) for row in rows if (score := row["metrics"].get("score")) is not None)
    ptq, qat = report["ptq"], stage_metrics(report, "qat") or {}
    own, here = target_of(report), RUNS[report["environment"]["target"]]
    for target, found in ptq["targets"].items() if ptq else ():
        if target not in here:  # this machine's kernels compute something else
            continue
        end = "" if target == own else f"_{target}"
        calibrated, score = any_row(report, f"{PTQ}{end}"), qat.get(f"score_{target}")
        trial = None if found["chosen"] is None else found["trials"][found["chosen"]]
        # If the stage scored fewer images or chose FP16, it did not measure this file on these images.
        if ptq and trial and calibrated and trial["number_format"] == "int8" and calibrated["images"] == ptq["images"]:
            yield f"{PTQ}{end}", "ptq", found.get("score", trial["score"])
        if score is not None:
            yield f"{QAT}{end}", "qat", score
