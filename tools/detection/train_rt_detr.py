"""Train a small RT-DETR from nothing on scenes of digits, with the denoising loss of transformers, and save it as a folder for `hf:FOLDER`.

`PYTHONPATH=tools python tools/detection/train_rt_detr.py FOLDER --minutes 25` continues a training that was stopped. The scenes are drawn anew for each batch from the
digits of the training part; the validation scenes (`data.dataset: scenes`) show other digits. transformers is needed.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from queried import stepped
from torch import Tensor

from compress.data.named import DATA_SETS
from compress.data.scenes import Scene, draw_scenes, scene
from export.images.box_listing import table_of
from export.tasks.average_precision import mean_average_precision, statistics

SIZE, CLASSES, BATCH, RATE, WARM_UP, DECAY = 96, 10, 16, 5e-4, 300, 0.998
DIFFICULTY = DATA_SETS["scenes"].scenes
EVERY = 500  # steps between two evaluations


def network() -> transformers.RTDetrForObjectDetection:
    """Return the network: a residual network of eight convolutions, one transformer layer on stride 32, three decoder layers, 30 queries."""
    settings = stepped(
        freeze_backbone_batch_norms=False,
        encoder_ffn_dim=192,
        num_queries=30,
        decoder_ffn_dim=192,
        decoder_layers=3,
        num_denoising=20,
        num_labels=CLASSES,
        id2label={number: str(number) for number in range(CLASSES)},
    )
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**settings))


def batch_of(scenes: list[Scene]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return images (n, 3, size, size) from 0 to 1 and each one's labels, as transformers' losses take them: boxes as centre and size."""
    images = torch.from_numpy(np.stack([one.image for one in scenes])).permute(0, 3, 1, 2).float() / 255
    targets = []
    for one in scenes:
        corners = torch.from_numpy(one.boxes[:, :4]) / SIZE
        places = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        targets.append({"class_labels": torch.from_numpy(one.boxes[:, 4]).long() - 1, "boxes": places})
    return images, targets


@torch.no_grad()
def score_of(model: torch.nn.Module) -> float:
    """Return COCO's mAP on the validation scenes."""
    assert DIFFICULTY is not None
    drawn = draw_scenes(DIFFICULTY, "val", size=SIZE, seed=0)
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255
    true = table_of(
        [np.column_stack([b[:, 4:] - 1, b[:, :4] / SIZE, np.zeros(len(b))]).astype(np.float32) for b in drawn.boxes]
    )
    found = []
    for part in images.split(50):
        outputs = model(part)
        chances = outputs.logits.sigmoid()
        best, place = chances.flatten(1).topk(100)
        boxes = outputs.pred_boxes.gather(1, (place // CLASSES)[..., None].expand(-1, -1, 4))
        corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], 2).clamp(0, 1)
        found.append(torch.cat([(place % CLASSES)[..., None], best[..., None], corners], 2))
    return mean_average_precision(statistics(torch.cat(found).numpy(), true))


def main() -> None:
    """Train for so many minutes, evaluate the moving average of the weights, and save it."""
    assert DIFFICULTY is not None
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--steps", type=int, default=8000, help="of the whole training; the rate falls to 0 by then")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = given.folder / "training.pt"
    torch.manual_seed(0)
    model, average = network().train(), network().eval()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    done, start = 0, time.monotonic()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["done"]
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
    while done < given.steps and time.monotonic() - start < 60 * given.minutes:
        torch.manual_seed(done)
        first = 10**6 + done * BATCH  # other scenes than the data set's own
        images, targets = batch_of(
            [scene(DIFFICULTY, "train", size=SIZE, seed=(0, 0, first + one)) for one in range(BATCH)]
        )
        rate = RATE * min(1, (done + 1) / WARM_UP) * (1 + math.cos(math.pi * done / given.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(images, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        kept = min(DECAY, (1 + done) / (10 + done))
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.copy_(mean.lerp(now, 1 - kept) if mean.is_floating_point() else now)
        if done % 50 == 0:
            print(f"step {done} loss {float(loss.detach()):.3f} {time.monotonic() - start:.0f} s", flush=True)  # noqa: T201
        if done % EVERY == 0 or done == given.steps:
            print(f"step {done} mAP {score_of(average):.4f}", flush=True)  # noqa: T201
            torch.save(
                {
                    "done": done,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                checkpoint,
            )
    average.save_pretrained(given.folder)
    (given.folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "RTDetrImageProcessor",
                "do_normalize": False,
                "do_rescale": True,
                "do_resize": True,
                "resample": 2,
                "rescale_factor": 1 / 255,
                "size": {"height": SIZE, "width": SIZE},
            }
        )
    )


if __name__ == "__main__":
    main()
