"""How a kernel's lanes fall on the pixels of a dense [B, C, H, W] tensor, and how host values reach it.

One Philox call makes the normals of four pixels in a row (a quad), so a lane owns one quad of K channels and
moves it as K tiles of four neighbouring elements, 16 bytes of float32 where the layout and W allow:

    NCHW                        K = 1, a tile is four pixels
    channels_last, C <= 4       K = C, the lane's 4 C elements are contiguous
    channels_last, C = 4 n      K = 4, a tile is four channels of one pixel
    channels_last, other C      K = 1, four pixels, C elements apart

A program takes BLOCK quads of one plane: an image's channel, or its K channels. Quads are aligned in the
coordinates of the whole image; where the tile's origin or its width is not a multiple of four, the quads at
its edges are cut by a mask.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

# A program of the interpreter is a string of numpy calls: few and large ones.
QUADS, QUADS_INTERPRETED = 256, 65536


def on_host(t: float | Tensor) -> bool:
    """Whether to pass the value; else the kernel reads it through a pointer, and a captured graph reads anew."""
    return not isinstance(t, Tensor) or t.device.type == "cpu"


def int32(value: int) -> int:
    """The int32 that holds the low 32 bits: one type, and one compiled kernel, for all values."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def draws(seed: int | Tensor, step: int | Tensor) -> dict[str, Any]:
    """The keywords by which a kernel finds its noise: sample i has the seed seed_low + 2^32 seed_high + i, or
    seed_ptr[i], or seed_ptr[0] + i; the step is there by value, or behind its pointer.
    """
    keywords: dict[str, Any] = {"seed_ptr": seed, "seed_low": 0, "seed_high": 0, "PER_SAMPLE": False}
    if not isinstance(seed, Tensor) or (seed.ndim == 0 and on_host(seed)):
        value = int(seed)
        keywords |= {"seed_ptr": None, "seed_low": int32(value), "seed_high": int32(value >> 32)}
    else:
        keywords["PER_SAMPLE"] = seed.ndim == 1
    host = on_host(step)
    return keywords | {"step_ptr": None if host else step, "step": int32(int(step)) if host else 0}


def strides(name: str, t: Tensor | None) -> dict[str, int]:
    """The keywords NAME0 .. NAME3."""
    return {f"{name}{i}": stride for i, stride in enumerate((0, 0, 0, 0) if t is None else t.stride())}


def place(y: Tensor, origin: tuple[int, int]) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the keywords by which a kernel finds its pixels."""
    batch, channels, height, width = y.shape
    h0, w0 = origin
    first, last = w0 // 4, -(-(w0 + width) // 4)
    quads = last - first
    planar = y.is_contiguous()
    if planar:
        k = 1
    elif channels <= 4:
        k = channels
    else:
        k = 4 if channels % 4 == 0 else 1
    block = QUADS
    if INTERPRETED:
        block = min(QUADS_INTERPRETED, triton.next_power_of_2(height * quads))
    blocks = triton.cdiv(height * quads, block)
    keywords = {
        "h0": int32(h0),
        "w4_0": int32(first),
        "cut": w0 - 4 * first,
        "blocks": blocks,
        "height": height,
        "width": width,
        "quads": quads,
        "C": channels,
        "K": k,
        "PLANAR": planar,
        "ALIGNED": w0 % 4 == 0 and width % 4 == 0,
        "BLOCK": block,
    }
    return (batch * (channels // k) * blocks,), keywords


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Run on the tensor's own GPU, with every product and sum rounded by itself."""
    with torch.cuda.device_of(like):
        kernel[grid](**arguments, enable_fp_fusion=False)


@triton.jit
def locate(blocks, height, quads, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sample b and first channel c; its lanes' quads: number r in the plane, row h, column w4."""
    program = tl.program_id(0)
    plane = program // blocks
    b = plane // (C // K)
    c = (plane % (C // K)) * K
    r = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return b, c, r, r // quads, r % quads


@triton.jit
def tile(k: tl.constexpr, K: tl.constexpr):
    """Pixel and channel of tile k's four elements within the lane, [1, 4]."""
    j = tl.arange(0, 4)[None, :]
    if K == 1:
        return j, j * 0
    elif K == 4:
        return j * 0 + k, j
    else:
        return (4 * k + j) // K, (4 * k + j) % K


@triton.jit
def dense(
    b, c, r, h, w4, cut, height, width, quads,
    C: tl.constexpr, K: tl.constexpr, PLANAR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Offsets of the lanes' tiles in a dense tensor, and which elements exist: K tiles [BLOCK, 4] of each."""
    j = tl.arange(0, 4)[None, :]
    b = b.to(tl.int64)
    PITCH: tl.constexpr = 1 if PLANAR else C
    exists = (r < height * quads)[:, None] & (j >= 0)
    offsets, masks = (), ()
    for k in tl.static_range(K):
        pixel, channel = tile(k, K)
        if ALIGNED:
            # in multiples of four, so that the compiler sees 16-byte accesses
            area = height * quads * 4
            start = (b * C + c) * area if PLANAR else b * area * C + c
            lane = r.to(tl.int64)[:, None] * (4 * PITCH)
            if K == 1:
                offset = start + lane + j * PITCH
            elif K == C:
                offset = start + lane + (4 * k + j)
            else:
                offset = start + lane + (k * C + j)
            mask = exists
        else:
            w = 4 * w4[:, None] + pixel - cut
            row = h.to(tl.int64)[:, None] * width + w
            start = (b * C + c) * height * width if PLANAR else b * height * width * C + c
            offset = start + row * PITCH + channel
            mask = exists & (w >= 0) & (w < width)
        offsets = offsets + (offset,)
        masks = masks + (mask,)
    return offsets, masks


@triton.jit
def strided(b, c, h, w4, cut, s0, s1, s2, s3, K: tl.constexpr):
    """Offsets of the lanes' tiles in a tensor of any strides."""
    offsets = ()
    for k in tl.static_range(K):
        pixel, channel = tile(k, K)
        w = (4 * w4[:, None] + pixel - cut).to(tl.int64)
        corner = b.to(tl.int64) * s0 + (c + channel).to(tl.int64) * s1 + h.to(tl.int64)[:, None] * s2
        offsets = offsets + (corner + w * s3,)
    return offsets


@triton.jit
def load(ptr, offsets, masks, K: tl.constexpr):
    """The lanes' K tiles, in the tensor's dtype."""
    tiles = ()
    for k in tl.static_range(K):
        tiles = tiles + (tl.load(ptr + offsets[k], mask=masks[k], other=0.0),)
    return tiles


@triton.jit
def load_if(coefficient, ptr, offsets, masks, K: tl.constexpr):
    """The lanes' K tiles; nothing is read where their coefficient is 0."""
    wanted = tl.full([1, 1], coefficient, tl.float32) != 0.0  # the interpreter cannot splat a comparison
    tiles = ()
    for k in tl.static_range(K):
        tiles = tiles + (tl.load(ptr + offsets[k], mask=masks[k] & wanted, other=0.0),)
    return tiles


@triton.jit
def store(ptr, tiles, offsets, masks, K: tl.constexpr):
    """The lanes' K tiles, rounded to the tensor's dtype."""
    for k in tl.static_range(K):
        tl.store(ptr + offsets[k], cast(tiles[k], ptr.dtype.element_ty), mask=masks[k])


@triton.jit
def cast(x, dtype: tl.constexpr):
    """To nearest even; the interpreter would cut bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        i = x.to(tl.uint32, bitcast=True)
        i = (i + 0x7FFF + ((i >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, i.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
