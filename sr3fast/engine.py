"""The inference form of the UNet: the same function of (x, y_t, level), rearranged to run fast.

    run = Engine(unet).start(x, shape, levels)
    run.into.copy_(y_t)
    eps_hat = run(i)                    f_theta(x, y_t, levels[i])

What is rearranged is listed in `Form`, one switch each; benchmarks/test_ladder.py shows what each one gives. Two
ideas carry most of it. A bias is a number a channel, so it need not be added where it arises: it travels with
its tensor (`Late`) until a norm adds it in passing. And everything that does not depend on y_t is done once:
x lies in the network's input, the noise embeddings of all levels are a table, the weights are packed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend, ops
from .contract import FLOATS
from .unet import Attention, Downsample, NoiseEmbedding, ResnetBlock, UNet, Upsample, sinusoid

__all__ = ["Engine", "Form"]

KEPT = 4  # shapes whose buffers (and CUDA graphs) are kept
ROWS = 2048  # least number of levels that a captured graph has room for


@dataclass(frozen=True)
class Form:
    """The transformations, each of them exact up to rounding; Form() has them all.

    channels_last     [B, H, W, C] in memory: what the convolutions compute in
    fused_norms       GroupNorm + SiLU in one op, statistics in float32 (ops.group_norm_silu)
    late_bias         biases and noise shifts are added by the next norm, not in passes of their own
    noise_table       the noise embeddings and their projections are computed once for all levels
    no_cat            norms read a pair of tensors, a 1x1 convolution of a cat is two
    fused_residual    the residual sum is part of a convolution (CPU, 1x1) or of the next norm (CUDA)
    prepacked         CPU: weights in the blocked layout that oneDNN wants for this shape
    upsample          nearest neighbour + 3x3 as one transposed 4x4 of stride 2: 4/9 of the products
    padded_channels   CUDA: input and output channels are a multiple of 8, for the tensor cores
    tuned             CUDA: by Triton, a bias and a residual in one pass, attention of few positions (half precision)
                      and, in a captured step, convolutions of few positions where that is faster (bfloat16); where
                      torch is asked to be deterministic when a step is captured, nothing is chosen by its time
    """

    channels_last: bool = True
    fused_norms: bool = True
    late_bias: bool = True
    noise_table: bool = True
    no_cat: bool = True
    fused_residual: bool = True
    prepacked: bool = True
    upsample: bool = True
    padded_channels: bool = True
    tuned: bool = True

    @classmethod
    def none(cls) -> Form:
        """The plain network."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})

    def on(self, device: torch.device, dtype: torch.dtype) -> Form:
        """What of it applies there."""
        on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
        prepacked = self.prepacked and self.channels_last and on_cpu and _packs(dtype)
        return dataclasses.replace(
            self,
            # one pass fewer only where the norm is fused; pairs are read by the fused norm
            late_bias=self.late_bias and self.fused_norms,
            no_cat=self.no_cat and self.fused_norms,
            upsample=self.upsample and (prepacked or on_cuda),  # plain on a CPU it is slower
            prepacked=prepacked,
            padded_channels=self.padded_channels and on_cuda,
            tuned=self.tuned and self.channels_last and on_cuda,
        )


# -------------------------------------------------------------------------------------------------- layers


class Late(NamedTuple):
    """The value main + residual + bias of which the sums have not been made yet."""

    main: Tensor  # [B, C, H, W]
    residual: Tensor | None = None


Value = Tensor | Late
Pair = tuple[Tensor, Tensor]


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's convolutions with packed weights, for this dtype on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:  # operators of torch.compile's own: of other versions we know nothing
        h = torch.ones(1, 16, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
        up = torch.ones(16, 16, 4, 4, dtype=dtype)
        conv = _PackedConv(up[:, :, :1, :1], None, h.shape)
        conv(conv(h), h)
        conv(h, h.clone(), owned=True)
        return bool((_PackedUpsample(up, None, h.shape)(h)[0, 0, 1, 1] == 64).item())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _kernels(device: torch.device) -> Any:
    """The Triton kernels where they run on tensors of the device; None else."""
    if device.type != "cuda" or backend.forced() not in (None, "triton"):
        return None
    module = backend.load("triton")
    return None if isinstance(module, str) or not _compiles(device) else module


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether Triton can: it needs the machine's C compiler, a folder to write to, a GPU that is not too old."""
    one = torch.ones(1, 8, 1, 1, device=device)
    try:
        backend.load("triton").conv.add(one, one.view(8), None)
    except Exception as error:
        warnings.warn(
            f"the engine goes without its Triton kernels, which cannot be compiled here: {error}", stacklevel=2
        )
        return False
    return True


def _add(out: Tensor, bias: Tensor, onto: Tensor | None) -> Tensor:
    """out += bias + onto: torch adds the bias in a pass of its own, which is slow on channels_last."""
    kernels = _kernels(out.device)
    if kernels is not None and _all_channels_last(out, onto):
        return kernels.conv.add(out, bias, onto)
    out.add_(bias[:, None, None])
    return out if onto is None else out.add_(onto)


def _all_channels_last(*tensors: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


class _Conv:
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
            return _add(out, self.bias, onto)
        return out if onto is None else out.add_(onto)


class _Product(_Conv):
    """A 1x1 convolution as a matrix product that accumulates."""

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        in_place = owned and self.bias is None
        if onto is None or not in_place or not onto.is_contiguous(memory_format=torch.channels_last):
            return super().__call__(h, onto, owned)
        rows = _positions(onto)
        rows.addmm_(_positions(h), self.weight.flatten(1).t())
        return onto


def _positions(h: Tensor) -> Tensor:
    """[B, C, H, W] channels_last as the matrix [B H W, C] that it is in memory."""
    return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])


class _PackedConv(_Conv):
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


class _Upsample:
    """Nearest neighbour times two, then the 3x3 convolution."""

    def __init__(self, conv: _Conv):
        self.conv = conv

    def __call__(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class _TransposedUpsample:
    """The same as one transposed 4x4 convolution of stride 2: four taps a pixel of the result, not nine."""

    one_pass = False

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, h: Tensor) -> Tensor:
        bias = None if self.one_pass else self.bias
        out = F.conv_transpose2d(h, self.weight, bias, stride=2, padding=1)
        return _add(out, self.bias, None) if self.one_pass and self.bias is not None else out


class _PackedUpsample(_TransposedUpsample):
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
    mix = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    mix = mix.to(weight.device)
    return torch.einsum("ka,lb,ocab->cokl", mix, mix, weight.double())


# in a capture and in the runs before it, where what is faster may be chosen
_choosing: ContextVar[bool] = ContextVar("sr3fast_choosing", default=False)


def _asked_to_be_deterministic() -> bool:
    """Whether nothing may be chosen by its time, which differs from process to process."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


class _Tuned:
    """W * h + bias + onto, or + the skips of `parts`: as the layers do it, or by one Triton kernel (kernels/conv.py).

    In the runs before a capture both are timed, once a shape in the life of the process, as cuDNN's own benchmark does;
    the capture has the faster. What is not captured runs by the layers.
    """

    choices: ClassVar[dict[Any, Any]] = {}  # device, layer and shapes -> the plan, or None for the layers

    def __init__(self, conv: Any, skips: Sequence[_Conv] = ()):
        self.conv, self.skips = conv, tuple(skips)
        self.up = isinstance(conv, _TransposedUpsample)
        self.stride = 1 if self.up else conv.stride
        self.parities: Tensor | None = None  # the weight of `up` as the kernel reads it

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False, parts: Sequence[Tensor] = ()):
        kernels = _kernels(h.device) if _choosing.get() and _all_channels_last(h, onto, *parts) else None
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
        plan = kernels.conv.plan(M, N, channels, _processors(h.device), self.stride, self.up, sums)
        if plan is None:
            return None
        try:
            layers = [copy.deepcopy(self) for _ in range(8)]  # the weights of each are in no cache, as in a step
            plain = _time(h.device, [functools.partial(f.by_layers, h, onto, parts) for f in layers])
            fused = _time(h.device, [functools.partial(f.by_kernel, kernels, plan, h, onto, parts) for f in layers])
        except Exception as error:  # a GPU that has not the memory for the tile, a Triton that cannot compile it
            warnings.warn(f"a convolution stays with cuDNN, its Triton kernel failed: {error}", stacklevel=2)
            return None
        return plan if fused < plain else None


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _time(device: torch.device, calls: Sequence[Callable[[], Tensor]]) -> float:
    """ms of the calls, one after the other on the GPU: the least of some turns."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    for call in calls:
        call()
    turns = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(40):  # empties the cache, and has the GPU busy until all calls are launched
            flush.zero_()
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        turns.append(begin.elapsed_time(end))
    return min(turns)


class _Norm:
    """act(GroupNorm(h + shift)) of a tensor, of a pair, or of a sum that is made on the way."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype, shift: Tensor | None, silu: bool, fused: bool):
        self.weight, self.bias = norm.weight.detach().float(), norm.bias.detach().float()
        self.groups, self.eps, self.shift, self.silu = norm.num_groups, norm.eps, shift, silu
        self.fused, self.dtype = fused, dtype

    def __call__(self, h: Value | Pair) -> tuple[Tensor, Any]:
        """act(GroupNorm(h + shift)), and h: where it was a sum, h + shift."""
        args = (self.weight, self.bias, self.groups, self.eps)
        if isinstance(h, Late) and h.residual is not None:
            return ops.add_group_norm_silu(h.main, h.residual, *args, shift=self.shift, silu=self.silu)
        if isinstance(h, Late):
            h = h.main
        if self.fused:
            return ops.group_norm_silu(h, *args, shift=self.shift, silu=self.silu), h
        s = torch.cat(h, 1) if isinstance(h, tuple) else h
        weight, bias = self.weight.to(self.dtype), self.bias.to(self.dtype)
        out = F.group_norm(s, self.groups, weight, bias, self.eps)
        return F.silu(out) if self.silu else out, h


class _Block:
    """A ResnetBlock: skip(h) + conv2(act(norm2(conv1(act(norm1(h))) + noise)))."""

    def __init__(self, build: _Builder, block: ResnetBlock, parts: list[_Part], lazy: bool, exact: bool):
        form = build.form
        attention = block.attention
        self.cat = len(parts) > 1 and not form.no_cat
        if self.cat:
            parts = [_Part(sum(p.channels for p in parts), _cat_bias(parts))]
        self.norm1 = build.norm(block.norm1, _cat_bias(parts))
        self.conv1 = build.conv(block.conv1, bias=not form.late_bias)
        self.shift = build.noise(block)
        self.add_shift = not form.late_bias
        self.norm2 = build.norm(block.norm2, None if self.add_shift else self.shift)
        self.skips: list[Any] = []
        # a sum that the norm makes has its bias in it
        biases = [] if parts[0].late else [p.bias for p in parts]
        if block.skip is not None:
            weights = block.skip.weight.split([p.channels for p in parts], 1)
            if form.late_bias:
                biases = [
                    w.detach().flatten(1).float() @ b for w, b in zip(weights, biases, strict=False) if b is not None
                ]
                biases.append(block.skip.bias)
            for k, weight in enumerate(weights):
                bias = block.skip.bias if k == 0 and not form.late_bias else None
                self.skips.append(build.conv_of(("skip", id(block.skip), k, len(parts)), weight, bias))
        biases.append(block.conv2.bias if form.late_bias else None)
        late = _sum(biases)
        last = attention is None
        self.conv2 = build.conv(
            block.conv2, bias=not form.late_bias, instead=late if last and exact and form.late_bias else None
        )
        self.joined: _Tuned | None = None
        if self.skips and isinstance(self.conv2, _Tuned) and all(skip.bias is None for skip in self.skips):
            self.joined = _Tuned(self.conv2.conv, self.skips)
        self.lazy = (lazy or not last) and build.lazy and not self.skips
        self.skips_first = form.prepacked
        out = _Part(block.conv2.out_channels, None if last and exact else late, self.lazy)
        self.attention = None
        if attention is not None:
            self.attention = _Attention(build, attention, out, lazy, exact)
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
            return Late(self.conv2(a), parts[0])
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


class _Attention:
    """h + out(softmax(q k^T / sqrt(C)) v)."""

    def __init__(self, build: _Builder, attention: Attention, part: _Part, lazy: bool, exact: bool):
        late_bias = build.form.late_bias
        self.norm = build.norm(attention.norm, part.bias, silu=False)
        self.qkv = build.conv(attention.qkv, bias=False)
        late = _sum([None if part.late else part.bias, attention.out.bias]) if late_bias else None
        self.out_conv = build.conv(attention.out, bias=not late_bias, instead=late if exact and late_bias else None)
        self.lazy = lazy and build.lazy
        self.tuned = build.form.tuned
        self.out = _Part(part.channels, None if exact else late, self.lazy)

    def __call__(self, h: Value) -> Value:
        a, s = self.norm(h)
        B, C, H, W = s.shape
        qkv = self.qkv(a).permute(0, 2, 3, 1).reshape(B, H * W, 3 * C)
        a = self.attend(qkv).view(B, H, W, C).permute(0, 3, 1, 2)
        return Late(self.out_conv(a), s) if self.lazy else self.out_conv(a, s)

    def attend(self, qkv: Tensor) -> Tensor:
        B, P, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        half = qkv.dtype in (torch.float16, torch.bfloat16) and qkv.is_contiguous()
        kernels = _kernels(qkv.device) if self.tuned and half else None
        if kernels is not None and (tile := kernels.attention.tile(B, P, C, qkv.device)) is not None:
            return kernels.attention.attention(qkv.new_empty(B, P, C), qkv, tile)
        q, k, v = qkv[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).reshape(B, P, C)


class _Apart:
    """A convolution whose sum is a pass of its own."""

    def __init__(self, conv: _Conv):
        self.conv = conv

    def __call__(self, h: Tensor, onto: Tensor | None = None, owned: bool = False) -> Tensor:
        out = self.conv(h)
        return out if onto is None else out.add_(onto)


# ------------------------------------------------------------------------------------------------ building


@dataclass
class _Part:
    """What is known of a tensor beforehand: its channels, the bias that it still lacks (float32 [C])."""

    channels: int
    bias: Tensor | None = None
    late: bool = False  # it comes as a sum, whose norm adds the bias


def _cat_bias(parts: list[_Part]) -> Tensor | None:
    if all(p.bias is None for p in parts):
        return None
    like = next(p.bias for p in parts if p.bias is not None)
    return torch.cat([like.new_zeros(p.channels) if p.bias is None else p.bias for p in parts])


def _sum(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [b.detach().float() for b in biases if b is not None]
    return torch.stack(given).sum(0) if given else None


class _Builder:
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
        self.form, self.dtype, self.device, self.packed = form, dtype, device, packed
        self.B, self.size = shape[0], tuple(shape[2:])
        self.shifts = torch.zeros(shape[0] * widths, device=device)
        self.blocks: list[ResnetBlock] = []
        self.width = 0  # of the noise shifts so far
        self.lazy = form.fused_norms and form.fused_residual and not form.prepacked
        self.layout = torch.channels_last if form.channels_last else torch.contiguous_format
        self.one_pass = form.tuned and _kernels(device) is not None
        self.tuned = self.one_pass and form.channels_last and form.fused_residual and dtype == torch.bfloat16

    def norm(self, norm: nn.GroupNorm, shift: Tensor | None, silu: bool = True) -> _Norm:
        if shift is not None and shift.ndim == 1:
            shift = shift.repeat(self.B, 1)
        dtype = torch.float32 if self.form.fused_norms else self.dtype
        return _Norm(norm, dtype, shift, silu, self.form.fused_norms)

    def noise(self, block: ResnetBlock) -> Tensor:
        """The place of the block's noise shift, [B, C] float32."""
        C = block.noise.out_features
        place = self.shifts[self.B * self.width : self.B * (self.width + C)].view(self.B, C)
        self.blocks.append(block)
        self.width += C
        return place

    def conv(self, conv: nn.Conv2d, bias: bool = True, instead: Tensor | None = None) -> Any:
        given = instead if instead is not None else conv.bias if bias else None
        return self.conv_of(id(conv), conv.weight, given, conv.stride[0])

    def conv_of(self, key: Any, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Any:
        make: Any = _PackedConv if self.form.prepacked else _Conv
        if self.form.fused_residual and self.form.channels_last and not self.form.prepacked:
            make = _Product if weight.shape[-1] == 1 else _Conv
        if (conv := self.packed.get(key)) is None:
            weight = weight.detach().to(self.dtype).contiguous(memory_format=self.layout)
            bias = None if bias is None else bias.detach().to(self.dtype, copy=True)
            conv = make(weight, bias, (self.B, weight.shape[1], *self.size), stride)
            conv.one_pass = self.one_pass
            conv = conv if self.form.fused_residual else _Apart(conv)
            conv = self.packed[key] = _Tuned(conv) if self.tuned and weight.shape[-1] == 3 else conv
        return conv

    def down(self, layer: Downsample) -> tuple[Any, _Part]:
        conv = self.conv(layer.conv, bias=not self.form.late_bias)
        self.size = tuple(n // 2 for n in self.size)
        return conv, self.part(layer.conv)

    def up(self, layer: Upsample) -> tuple[Any, _Part]:
        conv, key = layer.conv, id(layer.conv)
        shape = (self.B, conv.in_channels, *self.size)
        self.size = tuple(2 * n for n in self.size)
        if not self.form.upsample:
            return _Upsample(self.conv(conv, bias=not self.form.late_bias)), self.part(conv)
        if (up := self.packed.get(key)) is None:
            weight = transposed_weight(conv.weight.detach()).to(self.dtype)
            bias = None if self.form.late_bias else conv.bias.detach().to(self.dtype, copy=True)  # type: ignore[union-attr]
            if self.form.prepacked:
                up = _PackedUpsample(weight, bias, shape)
            else:
                up = _TransposedUpsample(weight.contiguous(memory_format=self.layout), bias)
            up.one_pass = self.one_pass
            up = self.packed[key] = _Tuned(up) if self.tuned else up
        return up, self.part(conv)

    def part(self, conv: nn.Conv2d) -> _Part:
        return _Part(conv.out_channels, _sum([conv.bias]) if self.form.late_bias else None)


class _Network:
    """The layers and buffers for one shape. Only one run uses it at a time."""

    def __init__(
        self,
        unet: UNet,
        form: Form,
        dtype: torch.dtype,
        device: torch.device,
        shape: Sequence[int],
        packed: dict[Any, Any],
    ):
        B, Cy, H, W = shape
        self.unet, self.form, self.device, self.shape = unet, form, device, tuple(shape)
        Cx = unet.in_channels - Cy
        self.input = torch.zeros((B, self.padded(unet.in_channels), H, W), dtype=dtype, device=device).contiguous(
            memory_format=torch.channels_last if form.channels_last else torch.contiguous_format
        )
        self.x = self.input[:, :Cx] if Cx else None
        self.into = self.input[:, Cx : Cx + Cy]
        blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock)]
        build = _Builder(form, dtype, device, shape, sum(b.noise.out_features for b in blocks), packed)
        self.layers(unet, build)
        self.blocks, self.shifts = build.blocks, build.shifts
        # shifts = row[spread]: a block's row once for each sample; of one sample, the row
        column, spread = 0, []
        for block in self.blocks:
            C = block.noise.out_features
            spread.append(torch.arange(column, column + C).repeat(B))
            column += C
        self.spread = torch.cat(spread).to(device) if B > 1 else None
        self.noise = _Noise(unet, self.blocks, form.late_bias)
        self.version: Any = None  # of the weights it was made from
        self.stream: Any = None  # the CUDA stream that used it last
        self.graph: _Graph | None = None

    def padded(self, channels: int) -> int:
        return -(-channels // 8) * 8 if self.form.padded_channels else channels

    def layers(self, unet: UNet, build: _Builder) -> None:
        late_bias = self.form.late_bias
        conv, extra = unet.conv_in, self.padded(unet.in_channels) - unet.in_channels
        bias = None if late_bias else conv.bias
        self.conv_in = build.conv_of(id(conv), F.pad(conv.weight, (0, 0, 0, 0, 0, extra)), bias)
        part = build.part(conv)
        pushed = [part]
        downs: list[Any] = list(unet.downs)
        mid: list[Any] = list(unet.mid)
        ups: list[Any] = list(unet.ups)
        self.downs: list[Any] = []
        for k, layer in enumerate(downs):
            if isinstance(layer, ResnetBlock):
                follower = downs[k + 1] if k + 1 < len(downs) else None
                down = isinstance(follower, Downsample)
                made: Any = _Block(build, layer, [part], lazy=not down, exact=down)
                part = made.out
            else:
                made, part = build.down(layer)
            self.downs.append(made)
            # what is read again is the sum, with its bias
            pushed.append(_Part(part.channels, None if part.late else part.bias))
        self.mid: list[Any] = []
        for k, layer in enumerate(mid):
            self.mid.append(_Block(build, layer, [part], lazy=k == 0, exact=False))
            part = self.mid[-1].out
        self.ups: list[Any] = []
        for k, layer in enumerate(ups):
            if isinstance(layer, ResnetBlock):
                last, up = k + 1 == len(ups), k + 1 < len(ups) and isinstance(ups[k + 1], Upsample)
                made = _Block(build, layer, [part, pushed.pop()], lazy=last, exact=up)
                part = made.out
            else:
                made, part = build.up(layer)
            self.ups.append(made)
        self.norm_out = build.norm(unet.norm_out, part.bias)
        conv, extra = unet.conv_out, self.padded(unet.out_channels) - unet.out_channels
        weight, bias = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, extra)), F.pad(conv.bias, (0, extra))  # type: ignore[arg-type]
        self.conv_out = build.conv_of(id(conv), weight, bias)

    def forward(self) -> Tensor:
        """eps_hat of what lies in the input, at the noise level that lies in the shifts."""
        h = self.conv_in(self.input)
        pushed = []
        for layer in self.downs:
            if isinstance(layer, _Block):
                h, read = layer(h)
                pushed.append(read)
            else:
                pushed.append(h)
                h = layer(h)
        for k, layer in enumerate(self.mid):
            h, read = layer(h)
            if k == 0:
                pushed.append(read)
        for layer in self.ups:
            h = layer((h, pushed.pop()))[0] if isinstance(layer, _Block) else layer(h)
        out = self.conv_out(self.norm_out(h)[0])
        return out[:, : self.into.shape[1]]

    def set(self, row: Tensor) -> None:
        """Lay a row of the noise table, [1, K], into the shifts."""
        if self.spread is None:
            self.shifts.copy_(row.view(-1))
        else:
            torch.index_select(row.view(-1), 0, self.spread, out=self.shifts)


class _Noise:
    """levels [N] -> float32 [N, K]: every block's noise shift (and conv1's bias), one beside the other."""

    def __init__(self, unet: UNet, blocks: list[ResnetBlock], with_bias: bool):
        self.embedding: NoiseEmbedding = unet.embedding
        self.silu = unet.variant == "ddpm"
        self.weight = torch.cat([b.noise.weight.detach().float() for b in blocks])
        bias = [b.noise.bias.detach().float() for b in blocks]
        if with_bias:
            bias = [n + b.conv1.bias.detach().float() for n, b in zip(bias, blocks, strict=True)]  # type: ignore[union-attr]
        self.bias = torch.cat(bias)

    def __call__(self, levels: Tensor) -> Tensor:
        first, second = self.embedding.linear1, self.embedding.linear2
        e = sinusoid(levels, first.in_features)
        e = F.silu(F.linear(e, first.weight.float(), first.bias.float()))
        e = F.linear(e, second.weight.float(), second.bias.float())
        return F.linear(F.silu(e) if self.silu else e, self.weight, self.bias)


# ---------------------------------------------------------------------------------------------------- runs


class _Run:
    """f_theta(x, y_t, levels[i]) = run(i), for the y_t in `into`; the result is valid until the next call."""

    def __init__(self, engine: Engine, network: _Network, levels: Tensor):
        self.engine, self.network, self.levels = engine, network, levels
        self.x, self.into = network.x, network.into
        self.table = network.noise(levels) if engine.form.noise_table else None
        weakref.finalize(self, engine._give_back, network)

    @torch.no_grad()
    def __call__(self, i: int) -> Tensor:
        with _plain(self.network.device):
            if self.table is None:
                self.network.set(self.network.noise(self.levels[i : i + 1]))
            else:
                self.network.set(self.table[i])
            return self.network.forward()


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """The engine has its own dtypes: autocast outside must not change them."""
    with torch.autocast(device.type, enabled=False):
        yield


class _Captured(_Run):
    """The same by one replay; `loop` has the solver's step in it too."""

    def __init__(self, engine: Engine, network: _Network, levels: Tensor):
        super().__init__(engine, network, levels)
        if network.graph is None or network.graph.capacity < len(levels):
            network.graph = None  # its memory first
            network.graph = _Graph(engine, network, max(len(levels), ROWS))
        self.graph = network.graph
        self.graph.table[: len(levels)].copy_(network.noise(levels) if self.table is None else self.table)

    @torch.no_grad()
    def __call__(self, i: int) -> Tensor:
        self.graph.prepare("network")
        self.graph.counter.fill_(i)
        self.graph.replay("network")
        return self.graph.eps_hat

    @torch.no_grad()
    def loop(self, y: Tensor, rows: Tensor, seeds: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
        """step(i) for i = 0..N-1 in turn: network and solver_step in one replay; returns y and m.

        y: float32 [B, Cy, H, W], the state to begin with, which is left as it is. rows: float32 [N, 9].
        seeds: int64 [B]. What step returns is overwritten by the next.
        """
        graph, N = self.graph, len(rows)
        graph.prepare("step")
        graph.rows[:N].copy_(rows)
        graph.seeds.copy_(seeds)
        graph.y.copy_(y)
        self.into.copy_(y)
        graph.counter.zero_()
        graph.step.fill_(N)

        @torch.no_grad()
        def step(i: int) -> tuple[Tensor, Tensor]:
            graph.replay("step")
            return graph.y, graph.m

        return step


class _Graph:
    """One shape's captured step: the static tensors that it reads and writes, and its CUDA graphs.

    A replay takes row `counter` of the tables, and moves `counter` and `step` on: the host gives it nothing,
    so another seed, schedule or picture is another content of the same tensors.
    """

    def __init__(self, engine: Engine, network: _Network, capacity: int):
        self.engine, self.network, self.capacity = engine, network, capacity
        device, shape = network.device, network.shape
        self.table = torch.zeros(capacity, len(network.noise.bias), device=device)
        self.rows = torch.zeros(capacity, 9, device=device)
        self.table_row, self.row = self.table[:1].clone(), self.rows[:1].clone()
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.ones(1, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.y, self.m, self.m1, self.m2 = (torch.zeros(shape, device=device) for _ in range(4))
        self.keep = torch.zeros(1, dtype=torch.bool, device=device)
        self.zero = torch.zeros(1, device=device)
        self.eps_hat = torch.zeros_like(network.into, memory_format=torch.preserve_format)
        self.graphs: dict[str, Any] = {}
        self.bodies = {"network": self.run_network, "step": self.run_step}

    def run_network(self) -> None:
        """eps_hat <- f_theta(x, into, levels[counter])"""
        torch.index_select(self.table, 0, self.counter, out=self.table_row)
        self.network.set(self.table_row)
        self.eps_hat.copy_(self.network.forward())

    def run_step(self) -> None:
        """The network and the solver's step of row `counter`; y, the history and `into` move on."""
        torch.index_select(self.table, 0, self.counter, out=self.table_row)
        torch.index_select(self.rows, 0, self.counter, out=self.row)
        self.network.set(self.table_row)
        ops.solver_step(
            self.y,
            self.network.forward(),
            self.row.view(9),
            self.seeds,
            self.step,
            history=(self.m1, self.m2),
            out=(self.y, self.m),
            into=self.network.into,
        )
        # a row with C0 = 0 keeps no history
        torch.ne(self.row[:, 5], self.zero, out=self.keep)
        torch.where(self.keep, self.m1, self.m2, out=self.m2)
        torch.where(self.keep, self.m, self.m1, out=self.m1)
        self.counter.add_(1)
        self.step.sub_(1)

    def prepare(self, name: str) -> None:
        """Capture it if that is still to be done; this leaves `counter`, `step` and the state anywhere."""
        if name not in self.graphs:
            with _plain(self.network.device):
                self.graphs[name] = self.engine._capture(self.bodies[name], self.reset)

    def replay(self, name: str) -> None:
        with self.engine._turn():
            self.graphs[name].replay()

    def reset(self) -> None:
        """Rows that exist: the runs before a capture move them on."""
        self.counter.zero_()
        self.step.fill_(self.capacity)


# -------------------------------------------------------------------------------------------------- engine


class Engine:
    """The inference form of a UNet; f_theta for a Sampler.

    Equivalent to (to rounding)::

        run = Engine(unet).start(x, y_t.shape, levels); run.into.copy_(y_t)
        run(i) == unet(x, y_t, levels[i].expand(B, 1))

    Args:
        unet: any `UNet`. Its weights are read, never changed; changed ones are noticed at the next start (see
            `repack`). Dropout never applies.
        dtype: of the network's arithmetic: float32, float16 or bfloat16; by default that of the weights.
        form: the transformations (`Form`).
        graph: capture the step as a CUDA graph, once a shape: "auto" on CUDA, True requires it, False not.

    Runs of one engine may interleave and may run in several threads and streams: each has buffers of its own.
    For each shape the packed weights, buffers and CUDA graphs are kept, for the last few shapes.

    Raises:
        TypeError: not a UNet, or one whose layers were exchanged or hooked: its function is another.
    """

    def __init__(
        self,
        unet: UNet,
        dtype: torch.dtype | None = None,
        form: Form | None = None,
        graph: bool | str = "auto",
    ):
        if (reason := refusal(unet)) is not None:
            raise TypeError(reason)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, float16 or bfloat16: got {dtype}")
        if not (graph in (True, False) or graph == "auto"):
            raise ValueError(f'graph must be "auto", True or False: got {graph!r}')
        self.unet, self.dtype = unet, dtype
        self.form = Form() if form is None else form
        self.graph = graph
        self.variant, self.in_channels, self.out_channels = unet.variant, unet.in_channels, unet.out_channels
        self.multiple = unet.multiple
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._idle: list[_Network] = []  # the last used last
        self._packed: dict[Any, Any] = {}  # layers that any shape can use
        self._version: Any = None
        self._values: Tensor | None = None
        self._captures: Any = None  # device, stream, and pool of the graphs' memory: only one stream's share it
        self._stream: Any = None  # that replayed last

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def start(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> _Run:
        """A run over the noise levels.

        Args:
            x: [B, Cx, H, W] in [-1, 1], any float dtype; None for an unconditional network.
            shape: of y_t, [B, Cy, H, W].
            levels: [N], float32 (variant "sr3") or int64 ("ddpm"), on the device of the weights.

        Returns:
            run, with run.x and run.into: views of the network's input, the second for y_t; and run(i):
            eps_hat [B, Cy, H, W] at levels[i], in the engine's dtype, valid until the next call. Where the
            step is captured, also run.loop.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        self._check(x, shape, levels)
        with torch.inference_mode(False), torch.no_grad(), _plain(levels.device):
            network = self._take(tuple(shape), levels.device)
            try:
                if x is not None:
                    assert network.x is not None
                    network.x.copy_(x)
                captured = self.graph is not False and levels.device.type == "cuda"
                run = _Captured if captured else _Run
                return run(self, network, levels)
            except BaseException:
                self._give_back(network)
                raise

    def repack(self) -> None:
        """Read the weights anew.

        `start` does so by itself where it sees a change: an in-place operation, an exchange, or, for writes
        through `.data`, another first element of a tensor.
        """
        with self._lock:
            self._drop()
            self._version = None

    def _check(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> None:
        if levels.ndim != 1 or len(levels) == 0:
            raise ValueError(f"levels must be [N], N at least 1: got {list(levels.shape)}")
        weight = self.unet.conv_in.weight
        for name, t in (("x", x), ("levels", levels)):
            if t is not None and t.device != weight.device:
                raise ValueError(f"{name} must be where the weights are, on {weight.device}: got {t.device}")
        if self.graph is True and weight.device.type != "cuda":
            raise ValueError(f"graph=True captures a CUDA graph: got weights on {weight.device}")
        if len(shape) != 4:
            raise ValueError(f"shape must be that of y_t, [B, C, H, W]: got {list(shape)}")
        level = levels[:1].expand(shape[0])
        y_t = weight.new_empty(0).expand(*shape[:3], 0) if 0 in shape else weight.new_empty(1).expand(*shape)
        self.unet.check_inputs(x, y_t, level if self.variant == "ddpm" else level[:, None])

    def _take(self, shape: tuple[int, ...], device: torch.device) -> _Network:
        """An idle network for the shape, or a new one: its caller's own until it gives it back."""
        with self._lock:
            self._refresh()
            dtype = self.dtype or self.unet.conv_in.weight.dtype
            network = next((n for n in reversed(self._idle) if n.shape == shape), None)
            if network is not None:
                self._idle.remove(network)
            else:
                form = self.form.on(device, dtype)
                packed = {} if form.prepacked else self._packed
                network = _Network(self.unet, form, dtype, device, shape, packed)
                network.version = self._version
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if network.stream not in (None, stream):
                    stream.wait_stream(network.stream)
                network.stream = stream
            return network

    def _give_back(self, network: _Network) -> None:
        with self._lock:
            if network.version is not self._version:
                return
            self._idle.append(network)
            if len(self._idle) > KEPT:
                if network.device.type == "cuda":
                    torch.cuda.synchronize(network.device)  # another stream may still use it
                self._idle.pop(0)

    def _refresh(self) -> None:
        """Drop what was packed from other weights."""
        tensors = list(self.unet.parameters())
        version = [(t.data_ptr(), t.device, t.dtype, -1 if t.is_inference() else t._version) for t in tensors]
        # `p.data.copy_(...)`, as averages of weights are often kept, leaves the counter alone
        values = torch.stack([t.detach()[(0,) * t.ndim].float() for t in tensors])
        if version != self._version or self._values is None or not torch.equal(values, self._values):
            self._drop()
            self._version, self._values = version, values

    def _drop(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._idle.clear()
        self._packed = {}

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One replay at a time: the graphs share their memory."""
        with self._lock:
            stream = torch.cuda.current_stream(self.unet.conv_in.weight.device)
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)
            self._stream = stream
            yield

    def _capture(self, body: Callable[[], None], reset: Callable[[], None]) -> Any:
        """A CUDA graph of body(), which reads and writes static tensors only."""
        device = self.unet.conv_in.weight.device
        collecting = gc.isenabled()
        benchmark = torch.backends.cudnn.benchmark
        with self._turn(), torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            if self._captures is None or self._captures[0] != device:
                self._captures = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            current, (_, stream, pool) = torch.cuda.current_stream(device), self._captures
            graph = torch.cuda.CUDAGraph()
            gc.disable()  # a collected kernel would unload its module in the middle of the capture
            by_time = not _asked_to_be_deterministic()  # the choice is made in the runs before the capture
            choosing = _choosing.set(by_time)
            torch.backends.cudnn.benchmark = by_time
            try:
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        reset()
                        body()
                reset()
                current.wait_stream(stream)
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    body()
            except RuntimeError as error:  # out of memory is one
                self._captures = None
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise RuntimeError(
                    f"the step could not be captured as a CUDA graph ({error}); graph=False runs it without"
                ) from error
            finally:
                _choosing.reset(choosing)
                torch.backends.cudnn.benchmark = benchmark
                if collecting:
                    gc.enable()
            current.wait_stream(stream)
            return graph

    def __repr__(self) -> str:
        return f"Engine({type(self.unet).__name__}, dtype={self.dtype}, {self.form})"


LAYERS = (
    *(UNet, NoiseEmbedding, ResnetBlock, Attention, Downsample, Upsample),
    *(nn.ModuleList, nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Dropout),
)


def refusal(f_theta: Any) -> str | None:
    """Why the engine cannot take the place of f_theta; None where it can."""
    if type(f_theta) is not UNet:
        return f"the engine runs sr3fast.UNet: got {type(f_theta).__name__}"
    if "forward" in vars(f_theta):
        return "this network's forward was replaced"
    for name, module in f_theta.named_modules():
        if type(module) not in LAYERS:
            return f"the engine knows the UNet's own layers: got {type(module).__name__} as {name}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a hook of {name or 'the network'} would not run in the engine"
    return None
