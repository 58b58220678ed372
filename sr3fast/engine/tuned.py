"""Convolutions of few positions on a GPU: cuDNN's or the Triton kernel, whichever is faster there."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import gpu
from .convolution import Conv, TransposedUpsample, all_channels_last

# in a capture and in the runs before it, where what is faster may be chosen
choosing: ContextVar[bool] = ContextVar("sr3fast_choosing", default=False)


def asked_to_be_deterministic() -> bool:
    """Whether nothing may be chosen by its time, which differs from process to process."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


class Tuned:
    """W * h + bias + onto, or + the skips of `parts`: as the layers do it, or by one Triton kernel (kernels/conv.py).

    In the runs before a capture both are timed, once a shape in the life of the process, as cuDNN's own benchmark does;
    the capture has the faster. What is not captured runs by the layers.
    """

    choices: ClassVar[dict[Any, Any]] = {}  # device, layer and shapes -> the plan, or None for the layers

    def __init__(self, conv: Any, skips: Sequence[Conv] = ()):
        self.conv, self.skips = conv, tuple(skips)
        self.up = isinstance(conv, TransposedUpsample)
        self.stride = 1 if self.up else conv.stride
        self.parities: Tensor | None = None  # the weight of `up` as the kernel reads it

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False, parts: Sequence[Tensor] = ()):
        kernels = gpu.kernels(h.device) if choosing.get() and all_channels_last(h, onto, *parts) else None
        if kernels is None:
            return self.by_layers(h, onto, parts)
        key = (
            *(h.device, h.shape, self.up, self.conv.weight.shape, self.stride, self.conv.bias is None),
            *(onto is None, tuple(p.shape[1] for p in parts)),
        )
        if key not in self.choices:
            self.choices.setdefault(key, self.choose(kernels, h, onto, parts))  # of two threads the first's
        plan = self.choices[key]
        return self.by_layers(h, onto, parts) if plan is None else self.by_kernel(kernels, plan, h, onto, parts)

    def by_layers(self, h: Tensor, onto: Tensor | None, parts: Sequence[Tensor]) -> Tensor:
        r = self.conv(h) if self.up else self.conv(h, onto)
        for skip, part in zip(self.skips, parts, strict=True):
            r = skip(part, r, owned=True)
        return r

    def by_kernel(self, kernels: Any, plan: Any, h: Tensor, onto: Tensor | None, parts: Sequence[Tensor]) -> Tensor:
        weight = self.conv.weight
        if self.up and self.parities is None:
            self.parities = kernels.conv.parities(weight)
        out = torch.empty(self.shape(h), dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
        products = [(part, skip.weight) for part, skip in zip(parts, self.skips, strict=True)]
        weight = self.parities if self.up else weight
        return kernels.conv.conv2d(out, h, weight, plan, self.stride, products, self.conv.bias, onto)

    def shape(self, h: Tensor) -> tuple[int, ...]:
        B, _, H, W = h.shape
        if self.up:
            return B, self.conv.weight.shape[1], 2 * H, 2 * W
        return B, self.conv.weight.shape[0], -(-H // self.stride), -(-W // self.stride)

    def choose(self, kernels: Any, h: Tensor, onto: Tensor | None, parts: Sequence[Tensor]) -> Any:
        """The plan that kernels/conv.py has for it, if it is the faster on these tensors."""
        B, N, H, W = self.shape(h)
        M, channels = B * H * W // (4 if self.up else 1), [h.shape[1], *(p.shape[1] for p in parts)]
        sums = onto is not None or len(parts) > 0
        plan = kernels.conv.plan(M, N, channels, gpu.processors(h.device), self.stride, self.up, sums)
        if plan is None:
            return None
        try:
            layers = [copy.deepcopy(self) for _ in range(8)]  # the weights of each are in no cache, as in a step
            plain = [functools.partial(f.by_layers, h, onto, parts) for f in layers]
            fused = [functools.partial(f.by_kernel, kernels, plan, h, onto, parts) for f in layers]
            faster = gpu.time_of(h.device, plain) > gpu.time_of(h.device, fused)
        except Exception as error:  # a GPU that has not the memory for the tile, a Triton that cannot compile it
            warnings.warn(f"a convolution stays with cuDNN, its Triton kernel failed: {error}", stacklevel=2)
            return None
        return plan if faster else None
