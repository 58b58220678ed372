"""3x3 convolutions in float32 on a CPU by minimal filtering: a quarter of the products (csrc/cpu/conv3x3.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend

LEAST_TILES = 16  # of 4x4 pixels: for fewer, reading the weights, four times as many, takes what is saved
LEAST_CHANNELS = 32  # of fewer, the rounding errors are more than twice those of the sum as it is written


def kernels() -> Any:
    """The C++ home where its convolution is the fastest; None else."""
    if backend.forced() not in (None, "cpp"):
        return None
    home = backend.load("cpp")
    return home if not isinstance(home, str) and home.fast_conv3x3() else None


def pays(weight: Tensor, B: int, size: Sequence[int]) -> bool:
    """Whether it is faster than oneDNN's, and as exact, for weight [N, C, k, k] and B pictures of `size`."""
    N, C, k, _ = weight.shape
    H, W = size
    tiles = B * -(-H // 4) * -(-W // 4)
    mostly_whole = 8 * tiles < B * H * W
    return k == 3 and min(C, N) >= LEAST_CHANNELS and tiles >= LEAST_TILES and mostly_whole


class Scratch:
    """Memory that the layers of a network work in, one after the other."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, device="cpu")

    def __call__(self, floats: int) -> Tensor:
        if self.memory.numel() < floats:
            # zeros: a block's last product may reach beyond its tiles, and denormal numbers are slow
            self.memory = torch.zeros(floats, dtype=torch.float32, device="cpu")
        return self.memory


class Winograd:
    """W * h + bias, and the sum with `onto` where that is given."""

    def __init__(self, home: Any, packed: Tensor, channels: int, bias: Tensor | None, scratch: Scratch):
        self.home, self.packed, self.channels, self.bias, self.scratch = home, packed, channels, bias, scratch

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        """`owned`: nobody else reads `onto`, so it may receive the result."""
        h = h.contiguous(memory_format=torch.channels_last)
        onto = None if onto is None else onto.contiguous(memory_format=torch.channels_last)
        if owned and onto is not None:
            out = onto
        else:
            shape = h.shape[0], self.channels, *h.shape[2:]
            out = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
        self.home.conv3x3(out, h, self.packed, self.bias, onto, self.scratch)
        return out
