"""Train a small YOLOX from nothing with its package's own loss, on the images of a recipe: the teacher of yolox_int8.yaml.

`python tools/detection/train_yolox.py RECIPE FOLDER --data IMAGES` writes FOLDER/yolox.safetensors; started again it goes on. Needs pip install pixeltable-yolox.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from yolox.config import YoloxConfig
from yolox.utils import ModelEMA

from compress.recipe.read import read_recipe
from compress.run import Run, open_run
from compress.tasks.own_loss import yolox_labels

BATCH, RATE, WARMUP = 16, 2e-3, 3  # the last in epochs
EVERY = 10  # epochs between two saved states


def train(run: Run, name: str, folder: Path, epochs: int) -> nn.Module:
    """Return the mean of the network's weights over the last steps; a state every EVERY epochs lets a killed training go on."""
    config = YoloxConfig.get_named_config(name)
    assert config is not None, f"{name}: unknown"
    config.num_classes, size = len(run.dataset.classes), run.dataset.preprocess.image_size
    network = config.get_model().to(memory_format=torch.channels_last)
    mean, state = ModelEMA(network, 0.998), folder / "state.pt"
    decayed = [weight for weight in network.parameters() if weight.dim() > 1]
    others = [weight for weight in network.parameters() if weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.AdamW(groups, RATE), -(-len(run.dataset.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps * epochs, pct_start=WARMUP / epochs)
    held = {"network": network, "mean": mean.ema, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if state.exists():
        known = torch.load(state)
        first, mean.updates = known["epoch"], known["epoch"] * steps
        for key, one in held.items():
            one.load_state_dict(known[key])
    started = time.monotonic()
    for epoch in range(first, epochs):
        network.train()
        losses = []
        for batch in run.feed.training(BATCH, epoch=epoch, view=epoch):
            images = batch.images.to(memory_format=torch.channels_last)
            loss = network(images, yolox_labels(batch.targets, size))["total_loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10)
            optimizer.step()
            schedule.step()
            mean.update(network)
            losses.append(float(loss))
        seconds = (time.monotonic() - started) / (epoch + 1 - first) * (epochs - epoch - 1)
        sys.stdout.write(
            f"epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.3f}, {seconds / 60:.1f} min left\n"
        )
        sys.stdout.flush()
        if (epoch + 1) % EVERY == 0:
            torch.save({"epoch": epoch + 1, **{key: one.state_dict() for key, one in held.items()}}, state)
    found: nn.Module = mean.ema
    return found.eval()


def main() -> None:
    """Write the trained network's weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", help="the images, in place of the recipe's")
    parser.add_argument("--name", default="yolox-nano")
    parser.add_argument("--epochs", type=int, default=130)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe(arguments.recipe, data=arguments.data)
    # Of the recipe only the images count here: there are no weights yet, whose outputs could be decoded.
    run = open_run(recipe.model_copy(update={"decode": None}), trust_code=True, verbose=False)
    torch.manual_seed(run.recipe.seed)
    network = train(run, arguments.name, arguments.folder, arguments.epochs)
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(weights, arguments.folder / "yolox.safetensors")


if __name__ == "__main__":
    main()
