"""Mixup and CutMix by (seed, view, image): the mixes drawn, and what they make of images and targets."""

import numpy as np
import pytest
import torch

from compress.data.augment import Augmentation
from compress.data.mixing import Mixes, draw_mixes, mix

SIZE, N = 8, 4000


def augmentation(mixup: float = 0.0, cutmix: float = 0.0) -> Augmentation:
    return Augmentation("none", 0.1, 0.2, flip=False, randaugment=0, mixup=mixup, cutmix=cutmix)


def drawn(**changes: float) -> Mixes:
    mixes = draw_mixes(augmentation(**changes), N, size=(SIZE, SIZE), seed=3)
    assert mixes is not None
    return mixes


def areas(mixes: Mixes) -> torch.Tensor:
    return (mixes.patch[:, 2] - mixes.patch[:, 0]) * (mixes.patch[:, 3] - mixes.patch[:, 1])


def test_without_either_nothing_is_drawn() -> None:
    assert draw_mixes(augmentation(), N, size=(SIZE, SIZE), seed=3) is None


def test_partners_are_a_shuffle_of_all_images() -> None:
    assert sorted(drawn(mixup=0.2).partner.tolist()) == list(range(N))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_shares_follow_the_beta_distribution(alpha: float) -> None:
    share = drawn(mixup=alpha).share.double()
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # of Beta(alpha, alpha)


def test_cutmix_leaves_a_patch_and_no_share() -> None:
    mixes = drawn(cutmix=1.0)
    assert bool((mixes.share == 1).all())
    assert bool(((mixes.patch >= 0) & (mixes.patch <= SIZE)).all())
    assert len(areas(mixes).unique()) > 10


def test_with_both_each_image_draws_one() -> None:
    mixes = drawn(mixup=1.0, cutmix=1.0)
    patched = mixes.share == 1
    assert float(patched.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert int(areas(mixes)[~patched].sum()) == 0


def test_another_seed_draws_other_mixes() -> None:
    other = draw_mixes(augmentation(mixup=1.0), N, size=(SIZE, SIZE), seed=4)
    assert other is not None
    assert not torch.equal(other.share, drawn(mixup=1.0).share)


def test_mixing_is_what_the_papers_write() -> None:
    random = np.random.default_rng(0)
    images, others = (random.random((3, 3, SIZE, SIZE), dtype=np.float32) for _ in range(2))
    mixes = Mixes(
        torch.tensor([1, 2, 0]),
        torch.tensor([0.25, 1.0, 1.0]),
        torch.tensor([[0, 0, 0, 0], [2, 3, 6, 8], [0, 0, 8, 8]]),
    )
    labels, other_labels = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    found, targets = mix(torch.from_numpy(images), labels, torch.from_numpy(others), other_labels, mixes, classes=3)
    pasted = images[1].copy()
    pasted[:, 2:6, 3:8] = others[1][:, 2:6, 3:8]
    expected = np.stack([0.25 * images[0] + 0.75 * others[0], pasted, others[2]])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    area = 4 * 5 / SIZE**2
    parts = np.array([[0.25, 0.75, 0.0], [0.0, 1 - area, area], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(targets.numpy(), parts, rtol=1e-5)
