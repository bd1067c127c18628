"""Try the gate: thirty times on what did not change, thirty times on a planted slow-down and on a planted loss of accuracy.

`make trials` does it and rewrites the table in docs/gate.md; it wants a machine that does nothing else. What the gate computes the
same way every time (sizes, operators, digests) is left out here: only what is random can raise a false alarm.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from chain import enlivened, fit_classifier_
from numpy.typing import NDArray
from onnx_files import small_contents
from PIL import Image
from sklearn.datasets import load_sample_images

from compress.models.architectures import build
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from export.bundle.read import read_bundle
from export.bundle.write import write_bundle
from export.command.table import print_live
from export.gate.accuracy import accuracy_checks
from export.gate.checks import Limits
from export.gate.latency import Opener, Plan, compare, judge, opener, record, self_test
from export.gate.predictions import Predictions, predict_all
from export.images.preprocess import Preprocess
from export.onnx_file.targets import TARGETS, host_target
from export.onnx_file.to_onnx import to_onnx
from export.runtime.environment import environment
from export.runtime.latency import median_ratio
from export.runtime.session import Run

TRIALS = 30
SIZE = 64
IMAGES = 5000
LOSS = 0.01  # of all images: right before, wrong now
CHURN = 0.015  # of all images change sides by chance: as many as between two INT8 files of one network
SLOWER = 1.10
PLAN = Plan(seconds=0.5)
LIMITS = Limits()
STATUSES = ("pass", "fail", "inconclusive", "unfit", "unexplained")
CLASSES = tuple(f"{photograph}-{part}" for photograph in ("china", "flower") for part in range(5))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BEGIN, END = "<!-- table: make trials -->", "<!-- end of table -->"
DOCUMENT = Path(__file__).parent.parent / "docs" / "gate.md"


@dataclass(frozen=True)
class Row:
    """The verdicts of all trials; in `needed` of them a regression was planted and must be found, with None in none."""

    name: str
    needed: int | None
    verdicts: Counter[str]

    @property
    def holds(self) -> bool:
        """Whether the planted regression was found often enough, or no false alarm was raised."""
        return not self.verdicts["fail"] if self.needed is None else self.verdicts["fail"] >= self.needed

    def cells(self) -> tuple[str, ...]:
        """Return one row of the table."""
        wanted = "no alarm" if self.needed is None else f"alarm in {self.needed} or more"
        return (self.name, wanted, *(str(self.verdicts[status]) for status in STATUSES))


def photographs(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return crops of scikit-learn's two photographs, (n, 64, 64, 3), and which of ten regions each shows."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]  # two of 640 x 427 pixels
    labels = rng.integers(0, len(CLASSES), count)
    crops = []
    for label in labels:
        left, top = 80 * (label % 5) + rng.integers(0, 80), rng.integers(0, 427 - 224)
        crop = pictures[label // 5].resize((SIZE, SIZE), Image.Resampling.BOX, (left, top, left + 224, top + 224))
        crops.append(np.asarray(crop))
    return np.stack(crops), labels


def write_trial_bundle(out: Path) -> None:
    """Write a bundle of a ResNet-18 that tells the regions apart, in float and in INT8."""
    torch.manual_seed(0)
    normalize = Preprocess((SIZE, SIZE), (SIZE, SIZE), MEAN, STD).normalize
    pixels, labels = photographs(400, seed=1)
    images = torch.from_numpy(normalize(pixels))
    model = enlivened(build("torchvision:resnet18", num_classes=len(CLASSES)), images)
    fit_classifier_(model, images, torch.from_numpy(labels))
    prepared = prepare(model, TARGETS["cpu_avx2"], images)
    calibrate_(prepared, images.split(50), "minmax")
    files = {name: out.parent / f"{name}.onnx" for name in ("student_fp32", "student_int8")}
    for network, path in zip((model, deploy(prepared)), files.values(), strict=True):
        to_onnx(network, path, shape=(3, SIZE, SIZE), metadata={})
    preprocess = {"image_size": SIZE, "resize_to": SIZE, "mean": list(MEAN), "std": list(STD)}
    made = replace(
        small_contents(files),
        preprocess=preprocess,
        labels=CLASSES,
        images=pixels[:4],
        truths=labels[:4],
        metrics={},
    )
    write_bundle(out, made)


def planted(before: Predictions, rng: np.random.Generator, *, loss: float, churn: float) -> Predictions:
    """Return other predictions: `loss` of all images turn wrong; by chance `churn` more change sides, as often to right as to wrong."""
    rows = dict(before.rows)
    right = rng.permutation(sorted(digest for digest, (_, (label, answer, *_)) in rows.items() if label == answer))
    wrong = rng.permutation(sorted(digest for digest, (_, (label, answer, *_)) in rows.items() if label != answer))
    lost = round(loss * len(rows)) + rng.binomial(len(rows), churn / 2)
    for digest in right[:lost]:
        name, (label, *_) = rows[digest]
        rows[digest] = (
            name,
            (label, float(rng.choice([other for other in range(len(before.labels)) if other != label]))),
        )
    for digest in wrong[: rng.binomial(len(rows), churn / 2)]:
        name, (label, *_) = rows[digest]
        rows[digest] = (name, (label, label))
    return replace(before, rows=rows)


def slowed(open_: Opener, factor: float) -> Opener:
    """Return the same session, each run of which goes on for `factor` times its own time."""

    def open_slow() -> Run:
        run = open_()

        def run_slowly() -> None:
            start = time.perf_counter()
            run()
            end = start + factor * (time.perf_counter() - start)
            while time.perf_counter() < end:
                pass

        return run_slowly

    return open_slow


def accuracy_trials(before: Predictions) -> list[Row]:
    """Return the rows on accuracy."""
    assert LIMITS.min_score_ratio is not None
    rows = []
    for name, needed, loss, churn in (
        ("the same predictions", None, 0.0, 0.0),
        (f"{CHURN:.1%} change sides by chance", None, 0.0, CHURN),
        (f"{LOSS:.0%} of the images lost", TRIALS - 1, LOSS, 0.0),
        (f"{LOSS:.0%} lost, and {CHURN:.1%} change sides by chance", TRIALS - 1, LOSS, CHURN),
    ):
        verdicts: Counter[str] = Counter()
        for seed in range(TRIALS):
            after = planted(before, np.random.default_rng(seed), loss=loss, churn=churn)
            checks, _ = accuracy_checks(before, after, LIMITS.min_score_ratio, same_file=False)
            verdicts[next(check.status for check in checks if check.name == "top-1")] += 1
        rows.append(Row(f"accuracy: {name}", needed, verdicts))
    return rows


def latency_trials(served: Opener, reference: Opener, trials: int, progress: Callable[[str], None]) -> list[Row]:
    """Return the rows on latency: the file beside itself, and its ratio to the float file beside the recorded one."""
    limit = LIMITS.max_latency_ratio
    assert limit is not None
    ratios = record(served, reference, PLAN, name="student_fp32").ratios
    then = median_ratio(np.array(ratios), confidence=PLAN.confidence)
    rows = []
    for name, needed, new in (("nothing", None, served), (f"{SLOWER - 1:.0%}", trials, slowed(served, SLOWER))):
        beside, ratio = Counter[str](), Counter[str]()
        for trial in range(trials):
            progress(f"latency: {name} slower, trial {trial + 1} of {trials}")
            plan = replace(PLAN, seed=trial)
            if self_test(new, plan, limit).status != "pass":
                beside["unfit"] += 1
                ratio["unfit"] += 1
                continue
            found, _ = compare(new, served, plan, limit)
            beside[judge(found, limit, was="", now="", explained=None).status] += 1
            found, _ = compare(new, reference, plan, limit, then=then)
            ratio[judge(found, limit, was="", now="", explained=None).status] += 1
        rows.append(Row(f"latency against the old file: {name} slower", needed, beside))
        rows.append(Row(f"latency over the float file: {name} slower", needed, ratio))
    return rows


def as_markdown(rows: Sequence[Row], before: Predictions) -> str:
    """Return the table with its conditions."""
    about = environment()
    header = ("trial", "wanted", *STATUSES)
    lines = [
        "| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *(row.cells() for row in rows))
    ]
    return "\n".join([
        *lines,
        "",
        f"Conditions: {rows[0].verdicts.total()} accuracy trials and {rows[-1].verdicts.total()} latency trials in each row; {about['cpu']}, {about['cores']} cores, {host_target().name}, ONNX Runtime {onnxruntime.__version__}; ResNet-18 at {SIZE} pixels in INT8, "
        f"one thread, batch 1, {PLAN.seconds:g} s for each file in a look of {PLAN.blocks} blocks, at most {PLAN.looks} looks, "
        f"limit {LIMITS.max_latency_ratio}; {len(before.rows):,} images, top-1 {before.score:.1%}, limit {LIMITS.min_score_ratio}.",
    ])  # fmt: skip


def main() -> int:
    """Try the gate, print the table, and exit with 1 where it raises a false alarm or misses what was planted."""
    parser = argparse.ArgumentParser(prog="python tools/trials.py", description=main.__doc__)
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each kind of latency trial")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{DOCUMENT.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_live("making a bundle")
        write_trial_bundle(Path(folder, "bundle"))
        bundle = read_bundle(Path(folder, "bundle"))
        pixels, labels = photographs(arguments.images, seed=2)
        np.savez(Path(folder, "images.npz"), images=pixels, labels=labels)
        print_live("scoring")
        before = predict_all(bundle, bundle.served, Path(folder, "images.npz"))
        rows = accuracy_trials(before)
        served, reference = (
            opener(path, bundle.preprocess, PLAN)
            for path in (bundle.files[bundle.served], bundle.files["student_fp32"])
        )
        rows += latency_trials(served, reference, arguments.trials, print_live)
    print_live("")
    found = as_markdown(rows, before)
    sys.stdout.write(f"{found}\n")
    if arguments.write:
        head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
