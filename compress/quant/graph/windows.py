"""Swin's shifted-window attention, with its linear layers called as modules so that they can be quantized.

torchvision hands their weights to one function, in which no layer can be seen. Projections act on every position alone, so they may stand
before the windows are cut and after they are put together again: padding, qkv, windows, proj, cropping give the same numbers.
"""

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

fx.wrap("pad_to_windows")
fx.wrap("attend_in_windows")
fx.wrap("crop_like")


def attend(attention: ShiftedWindowAttention, values: Tensor) -> Tensor:
    """Return torchvision's `shifted_window_attention` of (n, h, w, c), without its dropouts; traced, three functions and two layers."""
    window = list(attention.window_size)
    padded = pad_to_windows(values, window)
    mixed = attend_in_windows(
        attention.qkv(padded), attention.get_relative_position_bias(), window, list(attention.shift_size)
    )
    return crop_like(attention.proj(mixed), values)


def pad_to_windows(values: Tensor, window: list[int]) -> Tensor:
    """Return (n, h, w, c) with zeros to the right and below, up to multiples of the window."""
    height, width = values.shape[1:3]
    return F.pad(values, (0, 0, 0, -width % window[1], 0, -height % window[0]))


def crop_like(values: Tensor, original: Tensor) -> Tensor:
    """Return (n, h, w, c) cut to the original's height and width."""
    return values[:, : original.shape[1], : original.shape[2]].contiguous()


def attend_in_windows(qkv: Tensor, bias: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """Return the attention's mix of values (n, h, w, c) from `qkv` (n, h, w, 3 c); bias (1, heads, tokens, tokens)."""
    height, width, channels = qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    heads, tokens = bias.shape[1], window[0] * window[1]
    # A window as large as the image has nowhere to shift to.
    shift = [0 if side >= size else step for side, size, step in zip(window, (height, width), shift, strict=True)]
    if any(shift):
        qkv = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2))
    rows, columns = height // window[0], width // window[1]
    qkv = qkv.view(-1, rows, window[0], columns, window[1], 3, heads, channels // heads)
    query, key, value = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
        3, -1, rows * columns, heads, tokens, channels // heads
    )
    scores = (query * (channels // heads) ** -0.5) @ key.transpose(-2, -1) + bias  # (n, windows, heads, tokens, tokens)
    if any(shift):
        scores = scores + _apart(height, width, window, shift, scores)[:, None]
    mixed = scores.softmax(-1) @ value
    mixed = mixed.view(-1, rows, columns, heads, window[0], window[1], channels // heads)
    mixed = mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, channels)
    return torch.roll(mixed, (shift[0], shift[1]), (1, 2)) if any(shift) else mixed


def _apart(height: int, width: int, window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """Return (windows, tokens, tokens): -100 where two tokens of a shifted window come from opposite sides of the image, else 0."""
    sides = [
        (torch.arange(size) >= size - side).int() + (torch.arange(size) >= size - step)
        for size, side, step in zip((height, width), window, shift, strict=True)
    ]
    regions = (3 * sides[0][:, None] + sides[1]).view(height // window[0], window[0], width // window[1], window[1])
    regions = regions.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    return (regions[:, None] != regions[:, :, None]).to(like) * -100.0
