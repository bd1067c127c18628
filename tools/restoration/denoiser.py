"""A U-Net that takes noise off photographs: the network, its images and its training, for restoration_int8.yaml.

`python tools/restoration/denoiser.py PHOTOGRAPHS FOLDER` writes FOLDER/clean and FOLDER/noisy (train, val) and FOLDER/denoiser.safetensors;
started again it goes on. PHOTOGRAPHS has train/ and val/ with JPEG files, all of one size.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

SIGMA = 25 / 255  # of the noise, as in the denoising literature
CROP, BATCH, RATE = 32, 32, 2e-3


def rectified(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with its batch-norm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Denoiser(nn.Module):
    """A U-Net of three levels (Ronneberger 2015) that estimates the noise and takes it off the image (Zhang 2017)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, 4 * width
        self.down1 = nn.Sequential(rectified(3, w1), rectified(w1, w1))
        self.down2 = nn.Sequential(rectified(w1, w2, 2), rectified(w2, w2))
        self.down3 = nn.Sequential(rectified(w2, w3, 2), rectified(w3, w3))
        self.up2 = nn.Sequential(rectified(w3 + w2, w2), rectified(w2, w2))
        self.up1 = nn.Sequential(rectified(w2 + w1, w1), rectified(w1, w1))
        self.out = nn.Conv2d(w1, 3, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return restored images in [0, 1] of noisy ones in [-1, 1], both (n, 3, height, width)."""
        fine = self.down1(images)
        middle = self.down2(fine)
        coarse = F.interpolate(self.down3(middle), scale_factor=2)
        middle = F.interpolate(self.up2(torch.cat([coarse, middle], 1)), scale_factor=2)
        noise: Tensor = self.out(self.up1(torch.cat([middle, fine], 1)))
        return images * 0.5 + 0.5 - noise


def denoiser() -> nn.Module:
    """Return the network, for `model.arch: tools/restoration/denoiser.py:denoiser`."""
    return Denoiser()


def write_images(photographs: Path, folder: Path) -> dict[str, np.ndarray]:
    """Write both folders where they are missing; return the clean images of each split (n, height, width, 3)."""
    found = {}
    for seed, split in enumerate(("train", "val")):
        files = sorted((photographs / split).rglob("*.[jJ][pP]*[gG]"))
        found[split] = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        if (folder / "noisy" / split).exists():
            continue
        random = np.random.default_rng(seed)
        for kind in ("clean", "noisy"):
            (folder / kind / f"{split}.partial").mkdir(parents=True, exist_ok=True)
        for index, clean in enumerate(found[split]):
            noisy = np.clip(clean + random.normal(0, 255 * SIGMA, clean.shape), 0, 255).round().astype(np.uint8)
            for kind, image in (("clean", clean), ("noisy", noisy)):
                Image.fromarray(image).save(folder / kind / f"{split}.partial" / f"{index:05d}.png")
        for kind in ("clean", "noisy"):
            (folder / kind / f"{split}.partial").rename(folder / kind / split)
    return found


def batch(clean: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return a step's noisy crops in [-1, 1] and the clean ones in [0, 1], (BATCH, 3, CROP, CROP), a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(len(clean), (BATCH,), generator=generator)
    top, left = (int(torch.randint(clean.shape[side] - CROP + 1, (), generator=generator)) for side in (1, 2))
    crops = clean[which, top : top + CROP, left : left + CROP].permute(0, 3, 1, 2).float() / 255
    crops = crops.flip(3) if step % 2 else crops
    noisy = (crops + SIGMA * torch.randn(crops.shape, generator=generator)).clamp(0, 1)
    noisy = (noisy * 255).round() / 255  # as a file has it
    return noisy * 2 - 1, crops


def train(clean: Tensor, folder: Path, steps: int) -> nn.Module:
    """Return the trained network; a state every 500 steps lets a killed training go on."""
    network, state = Denoiser().to(memory_format=torch.channels_last), folder / "state.pt"
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    first = 0
    if state.exists():
        known = torch.load(state)
        first = known["step"]
        network.load_state_dict(known["network"])
        optimizer.load_state_dict(known["optimizer"])
        schedule.load_state_dict(known["schedule"])
    started, losses = time.monotonic(), []
    for step in range(first, steps):
        noisy, wanted = batch(clean, step)
        with torch.autocast("cpu", torch.bfloat16):
            restored = network(noisy.to(memory_format=torch.channels_last))
        loss = (restored.float() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
        if (step + 1) % 500 == 0:
            psnr, left = -10 * np.log10(np.mean(losses[-500:])), steps - step - 1
            seconds = (time.monotonic() - started) / (step + 1 - first) * left
            sys.stdout.write(f"step {step + 1} of {steps}: {psnr:.2f} dB in training, {seconds / 60:.1f} min left\n")
            sys.stdout.flush()
            states = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            torch.save({"step": step + 1, **states}, state)
    return network.eval()


def main() -> None:
    """Write the images and the trained network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = write_images(arguments.photographs, arguments.folder)
    network = train(torch.from_numpy(images["train"]), arguments.folder, arguments.steps)
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()},
        arguments.folder / "denoiser.safetensors",
    )


if __name__ == "__main__":
    main()
