"""Losses that weigh classes by the inverse of their frequency: by hand, and on digits of which one is rare."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from compress.data.images import ArrayImages
from compress.data.segmented import LazyMasks
from compress.errors import CompressError, RecipeError
from compress.models.saved import load_float
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.run import open_run
from compress.stages import source
from compress.tasks import TASKS
from export.images.listing import NO_LABEL
from export.images.preprocess import IGNORED, Preprocess

NETWORKS = Path(__file__).parent.parent / "networks.py"
RARE, OTHERS = 8, (1, 3, 9)  # an eight is easily taken for one of these
RECIPE = f"""
name: skewed
data: {{image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
model: {{arch: "{NETWORKS}:small"}}
stages:
  - {{stage: source, fit: {{epochs: 4, batch_size: 32, optimizer: adamw, lr: 0.01}}}}
"""


def images_of(labels: list[int]) -> ArrayImages:
    return ArrayImages(np.zeros((len(labels), 2, 2, 3), np.uint8), torch.tensor(labels))


def test_a_class_counts_as_much_as_any_other_and_images_weigh_one_in_the_mean() -> None:
    task = TASKS["classification"]
    assert task.class_weights is not None
    labels = [0] * 90 + [1] * 10 + [NO_LABEL] * 7
    weights = task.class_weights(images_of(labels), 2)
    assert weights.tolist() == pytest.approx([100 / 2 / 90, 100 / 2 / 10])
    assert weights[torch.tensor(labels[:100])].mean() == pytest.approx(1)
    logits, truths = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0]]), torch.tensor([0, 1, NO_LABEL])
    by_hand = (100 / 180 * np.log(2) + 5 * np.log(1 + np.exp(-1))) / 3  # the image without a label counts
    assert float(task.loss(logits, truths, label_smoothing=0.0, weights=weights)) == pytest.approx(by_hand, rel=1e-6)
    mixed = torch.tensor([[0.25, 0.75]])
    by_hand = (0.25 * 100 / 180 + 0.75 * 5) * np.log(2)
    assert float(task.loss(logits[:1], mixed, label_smoothing=0.0, weights=weights)) == pytest.approx(by_hand)


def test_masks_weigh_classes_by_their_pixels() -> None:
    task = TASKS["segmentation"]
    assert task.class_weights is not None
    masks = np.array([[[0, 0], [0, 0]], [[0, 0], [2, IGNORED]]], np.uint8)
    preprocess = Preprocess((2, 2), (2, 2), (0, 0, 0), (1, 1, 1))
    placed = LazyMasks(ArrayImages(masks[..., None], torch.zeros(2)), None, preprocess, 3)
    images = ArrayImages(np.zeros((2, 2, 2, 3), np.uint8), torch.zeros(2), placed=placed)
    weights = task.class_weights(images, 3)
    assert weights.tolist() == pytest.approx([7 / 2 / 6, 1, 7 / 2])  # no pixel is of class 1
    loss = task.loss(torch.zeros(2, 3, 2, 2), torch.from_numpy(masks), label_smoothing=0.0, weights=weights)
    assert float(loss) == pytest.approx(np.log(3), rel=1e-6)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in folders: of one class ten training images, of the others a hundred each; forty each for validation."""
    folder, found = tmp_path_factory.mktemp("skewed"), load_digits()
    for label in (RARE, *OTHERS):
        chosen = np.flatnonzero(found.target == label)
        for part, indices in (("val", chosen[:40]), ("train", chosen[40:50] if label == RARE else chosen[40:140])):
            (folder / part / str(label)).mkdir(parents=True)
            for index in indices:
                pixels = (found.images[index] * 15.9).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{index}.png")
    return folder


def recipe(folder: Path, out: Path, *changes: str) -> Recipe:
    (out / "recipe.yaml").write_text(RECIPE)
    return read_recipe(out / "recipe.yaml", ["data.dataset=imagefolder", f"data.path={folder}", f"out={out}", *changes])


def test_a_rare_class_gains_recall(skewed: Path, tmp_path: Path) -> None:
    found = {}
    for balance in ("none", "class_weights"):
        run = open_run(recipe(skewed, tmp_path, f"data.balance={balance}"), trust_code=True, verbose=False)
        out = tmp_path / balance
        out.mkdir()
        section = run.recipe.stages[0]
        assert section.stage == "source"
        source.apply(section, None, out, run)
        network = load_float(out, trust_code=True).eval()
        rare, right = run.dataset.classes.index(str(RARE)), list[bool]()
        for batch in run.feed.validation():
            with torch.inference_mode():
                right += (network(batch.images).argmax(1) == rare)[batch.targets == rare].tolist()
        found[balance] = float(np.mean(right))
    assert found["class_weights"] >= found["none"] + 0.2, found


def test_weights_that_no_loss_takes_are_refused(skewed: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.balance: class_weights weighs cross_entropy, which no stage uses"):
        recipe(skewed, tmp_path, "data.balance=class_weights", "model.weights=small.pt", "source.fit=null")
    scenes = ["data.balance=class_weights", "task=detection", "data.dataset=scenes", "data.path=null"]
    with pytest.raises(CompressError, match=r"data\.balance: the loss of detection allows no class_weights: leave it"):
        _ = open_run(recipe(skewed, tmp_path, *scenes), trust_code=True, verbose=False).learned
