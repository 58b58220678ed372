"""Convolutions: by torch, by oneDNN with packed weights, and upsampling before one as one transposed one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu


class Conv:
    """W * h + bias, and the sum with `onto` where that is given."""

    one_pass = False  # bias and `onto` are added by us, after the convolution

    def __init__(self, weight: Tensor, bias: Tensor | None, shape: Sequence[int], stride: int = 1):
        self.weight, self.bias, self.stride = weight, bias, stride
        self.padding = weight.shape[-1] // 2

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        """`owned`: nobody else reads `onto`, so it may receive the result."""
        bias = None if self.one_pass else self.bias
        out = F.conv2d(h, self.weight, bias, self.stride, self.padding)
        if self.one_pass and self.bias is not None:
            return add(out, self.bias, onto)
        return out if onto is None else out.add_(onto)


class Product(Conv):
    """A 1x1 convolution as a matrix product that accumulates."""

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        in_place = owned and self.bias is None
        if onto is None or not in_place or not onto.is_contiguous(memory_format=torch.channels_last):
            return super().__call__(h, onto, owned)
        rows = positions(onto)
        rows.addmm_(positions(h), self.weight.flatten(1).t())
        return onto


def positions(h: Tensor) -> Tensor:
    """[B, C, H, W] channels_last as the matrix [B H W, C] that it is in memory."""
    return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])


class PackedConv(Conv):
    """The same by oneDNN, with weights packed for h of `shape` and the sum as an epilogue."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shape: Sequence[int], stride: int = 1):
        super().__init__(weight, bias, shape, stride)
        self.how = ([self.padding] * 2, [stride] * 2, [1, 1], 1)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *self.how, list(shape))

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        if onto is None:
            return torch.ops.mkldnn._convolution_pointwise(h, self.weight, self.bias, *self.how, "none", [], "")
        epilogue: Any = ("add", 1.0, None, [], None)
        if owned:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                onto, h, self.weight, self.bias, *self.how, *epilogue
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(h, onto, self.weight, self.bias, *self.how, *epilogue)


class Apart:
    """A convolution whose sum is a pass of its own."""

    def __init__(self, conv: Callable[[Tensor], Tensor]):
        self.conv = conv

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        out = self.conv(h)
        return out if onto is None else out.add_(onto)


class Turned:
    """A convolution with rows for columns, of a weight that is turned too.

    In bfloat16, by AMX, oneDNN's of stride 2 is wrong where the result has one column: it reads what lies beyond
    (torch 2.13).
    """

    def __init__(self, conv: Conv):
        self.conv = conv

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        out = self.conv(h.transpose(2, 3).contiguous(memory_format=torch.channels_last)).transpose(2, 3)
        out = out.contiguous(memory_format=torch.channels_last)
        return out if onto is None else out.add_(onto)


class UpsampleConv:
    """Nearest neighbour times two, then the 3x3 convolution."""

    def __init__(self, conv: Conv):
        self.conv = conv

    def __call__(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class TransposedUpsample:
    """The same as one transposed 4x4 convolution of stride 2: four taps a pixel of the result, not nine."""

    one_pass = False

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, h: Tensor) -> Tensor:
        bias = None if self.one_pass else self.bias
        out = F.conv_transpose2d(h, self.weight, bias, stride=2, padding=1)
        return add(out, self.bias, None) if self.one_pass and self.bias is not None else out


class PackedUpsample(TransposedUpsample):
    def __init__(self, weight: Tensor, bias: Tensor | None, shape: Sequence[int]):
        self.how = ([1, 1], [0, 0], [2, 2], [1, 1], 1)
        pack = torch.ops.mkldnn._reorder_convolution_transpose_weight
        super().__init__(pack(weight.contiguous(), *self.how, list(shape)), bias)

    def __call__(self, h: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_transpose_pointwise(h, self.weight, self.bias, *self.how, "none", [], "")


def transposed_weight(weight: Tensor) -> Tensor:
    """The kernel [C, O, 4, 4] with which conv_transpose2d(stride=2, padding=1) is nearest + 3x3 [O, C, 3, 3].

    Pixel 2p of the result sees the enlarged pixels 2p-1, 2p, 2p+1, which are the pixels p-1, p, p: its taps
    are (w0, w1 + w2). Pixel 2p+1 sees p, p, p+1: (w0 + w1, w2).
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    mix = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=weight.dtype, device=weight.device)
    return torch.einsum("ka,lb,ocab->cokl", mix, mix, weight)


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's convolutions with packed weights, for this dtype on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:  # operators of torch.compile's own: of other versions we know nothing
        h = torch.ones(1, 16, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
        up = torch.ones(16, 16, 4, 4, dtype=dtype)
        conv = PackedConv(up[:, :, :1, :1], None, h.shape)
        conv(conv(h), h)
        conv(h, h.clone(), owned=True)
        return bool((PackedUpsample(up, None, h.shape)(h)[0, 0, 1, 1] == 64).item())
    except (AttributeError, RuntimeError, TypeError):
        return False


def add(out: Tensor, bias: Tensor, onto: Tensor | None) -> Tensor:
    """out += bias + onto: torch adds the bias in a pass of its own, which is slow on channels_last."""
    kernels = gpu.kernels(out.device)
    if kernels is not None and all_channels_last(out, onto):
        return kernels.conv.add(out, bias, onto)
    out.add_(bias[:, None, None])
    return out if onto is None else out.add_(onto)


def all_channels_last(*tensors: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
