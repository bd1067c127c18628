"""Cut a trained network and recover it without training, and say what each method gives: `make recovery`.

Prints a line for each goal, criterion and seed of the images, as docs/results.md shows them. With `--latency` each cut by
multiply-accumulates is followed by one that is held to the milliseconds that the first was measured at.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from compress.models.structure import classifier, width_cost
from compress.pruning.costs import full_widths, measure_layers
from compress.pruning.criteria import NEEDS_COVARIANCES, NEEDS_GRADIENTS
from compress.pruning.goals import Goal
from compress.pruning.latency.search import Latency, open_latency
from compress.pruning.latency.timings import Table
from compress.pruning.plan import Cut, Options, choose, cut_, find_groups, smallest_widths
from compress.pruning.planner import options_of
from compress.pruning.recovery.reconstruction import Method, kept_outputs, number_outputs, reconstruct
from compress.pruning.surgeon import input_covariances
from compress.recipe.schema import Recipe
from compress.recipe.stages import PruneStage
from compress.run import Run, open_run
from compress.scoring import Served
from compress.stages.prune import _accumulate_gradients_
from export.onnx_file.targets import CPU
from export.runtime.conditions import Conditions

IMAGES = 640
METHODS: tuple[Method, ...] = ("batch_norm", "least_squares")


def tell(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


@dataclass(frozen=True)
class Study:
    """A trained network, the images it is recovered by, and what is asked of it."""

    run: Run
    whole: nn.Module
    images: Tensor  # (n, 3, s, s)
    views: Tensor  # the same number of augmented ones

    def options(self, criterion: str) -> Options:
        """Return what may be cut, scored by a criterion."""
        model, example = copy.deepcopy(self.whole), self.images[:1]
        if criterion in NEEDS_GRADIENTS:
            _accumulate_gradients_(model, PruneStage(stage="prune", keep_macs=0.5), self.run)
        covariances = input_covariances(model, self.images[:256].split(32)) if criterion in NEEDS_COVARIANCES else None
        groups = find_groups(model, example, criterion, exclude=(classifier(model),), covariances=covariances)
        smallest = smallest_widths(groups, 0.1)
        return options_of(model, groups, example, scope="global", round_to=8, min_channels=smallest)

    def score(self, network: nn.Module) -> float:
        """Return the accuracy in percent."""
        return 100 * self.run.evaluate(network)["score"]

    def pruned(self, cuts: Sequence[Cut]) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the network as it is cut, and which outputs its layers keep."""
        student, numbered = copy.deepcopy(self.whole), number_outputs(self.whole)
        for network in (student, numbered):
            cut_(network, self.images[:1], cuts)
        return student, kept_outputs(numbered)

    def recovered(self, cuts: Sequence[Cut]) -> list[str]:
        """Return the scores as cut and after each method, and the seconds of the last."""
        student, kept = self.pruned(cuts)
        cells, seconds = [f"{self.score(student):.1f}"], 0.0
        for method in METHODS:
            started = time.process_time()
            network, used = reconstruct(student, self.whole, kept, self.images, method, views=self.views)
            seconds = time.process_time() - started
            cells.append(f"{self.score(network):.1f}" + ("" if used == method else f" ({used})"))
        return [*cells, f"{seconds:.0f} s"]


def open_study(run: Run, weights: Path, seed: int) -> Study:
    """Return the study of the recipe's network with images drawn by a seed."""
    assert run.recipe.model is not None
    _, whole = run.start(run.recipe.model.model_copy(update={"weights": str(weights)}))
    whole = whole.eval().to(memory_format=torch.channels_last)
    order = torch.randperm(min(8 * IMAGES, len(run.dataset.train)), generator=torch.Generator().manual_seed(seed))
    images, views = (
        torch.cat([batch.images for batch in batches])[order[:IMAGES]]
        for batches in (run.feed.calibration(len(order)), run.feed.views(len(order)))
    )
    return Study(run, whole, images, views)


def timed(study: Study, options: Options, goal: Goal, folder: Path, table: Path, size: int) -> Latency:
    """Return the clock and the time model of the study's network in INT8 at `size` pixels."""
    conditions = Conditions(CPU, 1, 1)
    write = Served(conditions, "int8", (3, size, size), study.run.target).write
    images = torch.zeros(1, 3, size, size)
    layers = measure_layers(study.whole, images)
    options = replace(options, layers=layers)
    return open_latency(
        study.whole, options, goal, Table(table, conditions), shape=(3, size, size), folder=folder, write=write, tell=tell
    )  # fmt: skip


def study_(study: Study, keeps: Sequence[float], criterion: str, seed: int, table: Path | None, size: int) -> None:
    """Print a line for each goal, and one for the same time where `table` is given."""
    options = study.options(criterion)
    cost = width_cost(study.whole, options.layers, "macs", study.run.shape)
    full = options.full(cost)
    with TemporaryDirectory() as folder:
        latency = None
        if table is not None:
            goal = Goal("keep_latency", "latency", 0.5)
            latency = timed(study, options, goal, Path(folder), table, size)
        for keep in keeps:
            cuts = choose(options, cost, keep * full)
            cells = [criterion, seed, f"keep_macs {keep:.2f}", *shares(study, cuts, latency), *study.recovered(cuts)]
            say(cells)
            if latency is not None:
                network, _ = study.pruned(cuts)
                asked = latency.measured_ms(network, latency.folder / "student.onnx")
                sized = replace(options, layers=latency.model.layers)
                attempts = latency.choose(study.whole, torch.zeros(1, 3, size, size), sized, asked)
                cuts = list(attempts[-1].cuts)
                say([criterion, seed, "the same time", *shares(study, cuts, latency), *study.recovered(cuts)])


def shares(study: Study, cuts: Sequence[Cut], latency: Latency | None) -> list[str]:
    """Return which fractions of the multiply-accumulates and of the time are left."""
    network, _ = study.pruned(cuts)
    layers = measure_layers(network, study.images[:1])
    left = width_cost(network, layers, "macs", study.run.shape)(*full_widths(layers))
    layers = measure_layers(study.whole, study.images[:1])
    macs = left / width_cost(study.whole, layers, "macs", study.run.shape)(*full_widths(layers))
    if latency is None:
        return [f"{macs:.3f}", "–"]
    took = latency.measured_ms(network, latency.folder / "student.onnx")
    return [f"{macs:.3f}", f"{took / latency.whole_ms:.3f}"]


def say(cells: Sequence[object]) -> None:
    sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--keep", type=float, nargs="+", default=(0.7, 0.5, 0.3))
    parser.add_argument("--criterion", nargs="+", default=("l2",))
    parser.add_argument("--seed", type=int, nargs="+", default=(0,))
    parser.add_argument("--latency", type=int, metavar="PIXELS", help="compare with the same INT8 time at this size")
    parser.add_argument("--table", type=Path, default=Path("runs/latency-table"))
    arguments = parser.parse_args()
    facts = {
        "name": "recovery",
        "data": {
            "dataset": "imagefolder",
            "path": arguments.data,
            "image_size": arguments.image_size,
            "augment": {"crop": "random_resized", "flip": True},
        },
        "model": {"arch": arguments.arch},
        "stages": [{"stage": "source", "fit": {"epochs": 1}}],
    }
    run = open_run(Recipe.model_validate(facts), trust_code=False, verbose=False)
    say(["criterion", "seed", "goal", "MACs", "time", "as cut", "batch-norm", "least squares", "its time"])
    for seed in arguments.seed:
        study = open_study(run, arguments.weights, seed)
        tell(f"teacher {study.score(study.whole):.1f} %")
        for criterion in arguments.criterion:
            table = arguments.table if arguments.latency else None
            study_(study, arguments.keep, criterion, seed, table, arguments.latency or 0)


if __name__ == "__main__":
    main()
