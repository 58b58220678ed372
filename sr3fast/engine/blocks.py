"""The layers of the network as the engine runs them, and the builder that makes them of the UNet's.

A value may still lack two sums, which the norm that reads it makes in passing: a bias, known beforehand, which its
`Part` holds (Form.late_bias), and a residual, for which it comes as a `PendingSum` (Form.fused_residual). Of a value's
reader
    lazy     says that it is a norm alone, so the residual may be left to it;
    exact    says that it is no norm, so what the value lacks must be in it: the last convolution takes the bias
             `instead` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..unet import Attention, Downsample, ResnetBlock, Upsample
from . import gpu, winograd
from .convolution import (
    Apart,
    Conv,
    PackedConv,
    PackedUpsample,
    Product,
    TransposedUpsample,
    Turned,
    UpsampleConv,
    transposed_weight,
)
from .form import Form
from .tuned import Tuned
from .winograd import Scratch, Winograd


class PendingSum(NamedTuple):
    """The value main + residual, a sum that has not been made yet; both [B, C, H, W]."""

    main: Tensor
    residual: Tensor


Value = Tensor | PendingSum
Pair = tuple[Tensor, Tensor]


class Norm:
    """act(GroupNorm(h + shift)) of a tensor, of a pair, or of a sum that is made on the way."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype, shift: Tensor | None, silu: bool, fused: bool):
        self.weight, self.bias = held(norm.weight), held(norm.bias)
        self.groups, self.eps, self.shift, self.silu = norm.num_groups, norm.eps, shift, silu
        self.fused, self.dtype = fused, dtype

    def __call__(self, h: Value | Pair) -> tuple[Tensor, Any]:
        """act(GroupNorm(h + shift)), and h: where it was a sum, h + shift."""
        args = (self.weight, self.bias, self.groups, self.eps)
        if isinstance(h, PendingSum):
            return ops.add_group_norm_silu(h.main, h.residual, *args, shift=self.shift, silu=self.silu)
        if self.fused:
            return ops.group_norm_silu(h, *args, shift=self.shift, silu=self.silu), h
        s = torch.cat(h, 1) if isinstance(h, tuple) else h
        weight, bias = self.weight.to(self.dtype), self.bias.to(self.dtype)
        out = F.group_norm(s, self.groups, weight, bias, self.eps)
        return F.silu(out) if self.silu else out, h


class Block:
    """A ResnetBlock: skip(h) + conv2(act(norm2(conv1(act(norm1(h))) + noise)))."""

    def __init__(self, build: Builder, block: ResnetBlock, parts: list[Part], lazy: bool, exact: bool):
        form = build.form
        attention = block.attention
        self.cat = len(parts) > 1 and not form.no_cat
        if self.cat:
            parts = [Part(sum(p.channels for p in parts), cat_bias(parts))]
        self.norm1 = build.norm(block.norm1, cat_bias(parts))
        self.conv1 = build.conv(block.conv1, bias=not form.late_bias)
        self.shift = build.reserve_shift(block)
        self.add_shift = not form.late_bias
        self.norm2 = build.norm(block.norm2, None if self.add_shift else self.shift)
        self.skips: list[Any] = []
        lacking = [None if p.late else p.bias for p in parts]  # a sum that the norm made has its bias
        if block.skip is not None:
            self.skips, lacking = build.skips(block.skip, parts, lacking)
        late = sum_of([*lacking, block.conv2.bias]) if form.late_bias else None
        last = attention is None
        self.conv2 = build.conv(block.conv2, bias=not form.late_bias, instead=late if last and exact else None)
        self.joined: Tuned | None = None
        if self.skips and isinstance(self.conv2, Tuned) and all(skip.bias is None for skip in self.skips):
            self.joined = Tuned(self.conv2.conv, self.skips)
        self.lazy = (lazy or not last) and build.lazy and not self.skips
        self.skips_first = form.prepacked
        out = Part(block.conv2.out_channels, None if last and exact else late, self.lazy)
        self.attention = None
        if attention is not None:
            self.attention = AttentionBlock(build, attention, out, lazy, exact)
            out = self.attention.out
        self.out = out

    def __call__(self, h: Value | Pair) -> tuple[Value, Any]:
        """The block's value, and the tensor that it read."""
        if self.cat:
            h = torch.cat(h, 1)  # type: ignore[arg-type]
        a, h = self.norm1(h)
        r = self.conv1(a)
        if self.add_shift:
            r = r + self.shift[:, :, None, None].to(r.dtype)
        a, _ = self.norm2(r)
        r = self.join(a, h)
        return (r if self.attention is None else self.attention(r)), h

    def join(self, a: Tensor, h: Any) -> Value:
        parts = h if isinstance(h, tuple) else (h,)
        if self.lazy:
            return PendingSum(self.conv2(a), parts[0])
        if not self.skips:
            return self.conv2(a, parts[0])
        if self.skips_first:  # oneDNN adds in any convolution
            onto = None
            for skip, part in zip(self.skips, parts, strict=True):
                onto = skip(part, onto, owned=True)
            return self.conv2(a, onto, owned=True)
        if self.joined is not None:
            return self.joined(a, parts=parts)
        r = self.conv2(a)
        for skip, part in zip(self.skips, parts, strict=True):
            r = skip(part, r, owned=True)
        return r


class AttentionBlock:
    """h + out(softmax(q k^T / sqrt(C)) v)."""

    def __init__(self, build: Builder, attention: Attention, part: Part, lazy: bool, exact: bool):
        late_bias = build.form.late_bias
        self.norm = build.norm(attention.norm, part.bias, silu=False)
        self.qkv = build.conv(attention.qkv, bias=False)
        late = sum_of([None if part.late else part.bias, attention.out.bias]) if late_bias else None
        self.out_conv = build.conv(attention.out, bias=not late_bias, instead=late if exact else None)
        self.lazy = lazy and build.lazy
        self.tuned = build.form.tuned
        self.out = Part(part.channels, None if exact else late, self.lazy)

    def __call__(self, h: Value) -> Value:
        a, s = self.norm(h)
        B, C, H, W = s.shape
        qkv = self.qkv(a).permute(0, 2, 3, 1).reshape(B, H * W, 3 * C)
        a = self.attend(qkv).view(B, H, W, C).permute(0, 3, 1, 2)
        return PendingSum(self.out_conv(a), s) if self.lazy else self.out_conv(a, s)

    def attend(self, qkv: Tensor) -> Tensor:
        B, P, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        half = qkv.dtype in (torch.float16, torch.bfloat16) and qkv.is_contiguous()
        kernels = gpu.kernels(qkv.device) if self.tuned and half else None
        if kernels is not None and (tile := kernels.attention.tile(B, P, C, qkv.device)) is not None:
            return kernels.attention.attention(qkv.new_empty(B, P, C), qkv, tile)
        q, k, v = qkv[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).reshape(B, P, C)


@dataclass
class Part:
    """What is known of a tensor beforehand: its channels, the bias that it still lacks (float32 [C])."""

    channels: int
    bias: Tensor | None = None
    late: bool = False  # it comes as a sum, whose norm adds the bias


def held(parameter: Tensor) -> Tensor:
    """A float32 copy: a run keeps the weights that it began with."""
    return parameter.detach().to(torch.float32, copy=True)


def cat_bias(parts: list[Part]) -> Tensor | None:
    if all(p.bias is None for p in parts):
        return None
    like = next(p.bias for p in parts if p.bias is not None)
    return torch.cat([like.new_zeros(p.channels) if p.bias is None else p.bias for p in parts])


def sum_of(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [b.detach().float() for b in biases if b is not None]
    return torch.stack(given).sum(0) if given else None


class Builder:
    """Makes the layers for one shape; `size` is that of the input of the next layer."""

    def __init__(
        self,
        form: Form,
        dtype: torch.dtype,
        device: torch.device,
        shape: Sequence[int],
        widths: int,
        packed: dict[Any, Any],
    ):
        self.form, self.dtype = form, dtype
        self.packed = packed  # what any shape can use
        self.layers = {} if form.prepacked else packed
        self.scratch = Scratch()
        self.B, self.size = shape[0], tuple(shape[2:])
        self.shifts = torch.zeros(shape[0] * widths, dtype=torch.float32, device=device)
        self.blocks: list[ResnetBlock] = []
        self.width = 0  # of the noise shifts so far
        self.lazy = form.fused_norms and form.fused_residual and not form.prepacked
        self.layout = torch.channels_last if form.channels_last else torch.contiguous_format
        self.one_pass = form.tuned and gpu.kernels(device) is not None
        self.tuned = self.one_pass and form.channels_last and form.fused_residual and dtype == torch.bfloat16

    def norm(self, norm: nn.GroupNorm, shift: Tensor | None, silu: bool = True) -> Norm:
        if shift is not None and shift.ndim == 1:
            shift = shift.repeat(self.B, 1)
        dtype = torch.float32 if self.form.fused_norms else self.dtype
        return Norm(norm, dtype, shift, silu, self.form.fused_norms)

    def reserve_shift(self, block: ResnetBlock) -> Tensor:
        """The place of the block's noise shift, [B, C] float32, beside those of the blocks before it."""
        C = block.noise.out_features
        place = self.shifts[self.B * self.width : self.B * (self.width + C)].view(self.B, C)
        self.blocks.append(block)
        self.width += C
        return place

    def skips(
        self, skip: nn.Conv2d, parts: list[Part], lacking: list[Tensor | None]
    ) -> tuple[list[Any], list[Tensor | None]]:
        """The 1x1 convolution of a cat as one of each part, and what their sum lacks of a bias."""
        late = self.form.late_bias
        weights = skip.weight.split([p.channels for p in parts], 1)
        convs = [
            self.conv_of(("skip", id(skip), k, len(parts)), weight, None if late or k > 0 else skip.bias)
            for k, weight in enumerate(weights)
        ]
        if not late:
            return convs, lacking
        through = [
            None if b is None else w.detach().flatten(1).float() @ b for w, b in zip(weights, lacking, strict=True)
        ]
        return convs, [*through, skip.bias]

    def conv(self, conv: nn.Conv2d, bias: bool = True, instead: Tensor | None = None) -> Any:
        given = instead if instead is not None else conv.bias if bias else None
        return self.conv_of(id(conv), conv.weight, given, conv.stride[0])

    def conv_of(self, key: Any, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Any:
        if self.form.winograd and stride == 1 and winograd.pays(weight, self.B, self.size):
            fast = self.filtered(key, weight, bias)
            return fast if self.form.fused_residual else Apart(fast)
        make: Any = PackedConv if self.form.prepacked else Conv
        if self.form.fused_residual and self.form.channels_last and not self.form.prepacked:
            make = Product if weight.shape[-1] == 1 else Conv
        narrow = stride == 2 and self.size[1] <= 2 and self.dtype == torch.bfloat16 and weight.device.type == "cpu"
        size = self.size
        if narrow:
            key, weight, size = (key, "turned"), weight.transpose(2, 3), self.size[::-1]
        if (conv := self.layers.get(key)) is None:
            weight = weight.detach().to(self.dtype, copy=True, memory_format=self.layout)
            bias = None if bias is None else bias.detach().to(self.dtype, copy=True)
            conv = make(weight, bias, (self.B, weight.shape[1], *size), stride)
            if narrow:
                conv = self.layers[key] = Turned(conv)
                return conv
            conv.one_pass = self.one_pass
            conv = conv if self.form.fused_residual else Apart(conv)
            conv = self.layers[key] = Tuned(conv) if self.tuned and weight.shape[-1] == 3 else conv
        return conv

    def filtered(self, key: Any, weight: Tensor, bias: Tensor | None) -> Winograd:
        home = winograd.kernels()
        if (packed := self.packed.get((key, "winograd"))) is None:
            packed = self.packed[key, "winograd"] = home.conv3x3_pack(weight.detach().float())
        return Winograd(home, packed, len(weight), None if bias is None else held(bias), self.scratch)

    def down(self, layer: Downsample) -> tuple[Any, Part]:
        conv = self.conv(layer.conv, bias=not self.form.late_bias)
        self.size = tuple(n // 2 for n in self.size)
        return conv, self.part(layer.conv)

    def up(self, layer: Upsample) -> tuple[Any, Part]:
        conv, key = layer.conv, id(layer.conv)
        shape = (self.B, conv.in_channels, *self.size)
        self.size = tuple(2 * n for n in self.size)
        if not self.form.upsample:
            return UpsampleConv(self.conv(conv, bias=not self.form.late_bias)), self.part(conv)
        if (up := self.layers.get(key)) is None:
            weight = transposed_weight(conv.weight.detach()).to(self.dtype)
            bias = None if self.form.late_bias else conv.bias.detach().to(self.dtype, copy=True)  # type: ignore[union-attr]
            if self.form.prepacked:
                up = PackedUpsample(weight, bias, shape)
            else:
                up = TransposedUpsample(weight.contiguous(memory_format=self.layout), bias)
            up.one_pass = self.one_pass
            up = self.layers[key] = Tuned(up) if self.tuned else up
        return up, self.part(conv)

    def part(self, conv: nn.Conv2d) -> Part:
        return Part(conv.out_channels, sum_of([conv.bias]) if self.form.late_bias else None)
