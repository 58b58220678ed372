"""softmax(q k^T / sqrt(C)) v of few positions: a row of scores is held whole, the result's channels are split too.

One pass over q and k for each tile of [BM positions, BC channels] of the result: the scores are computed C / BC times,
which costs less than leaving most of the GPU idle.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import launch
from .pixels import _INTERPRETED, cast

POSITIONS = 256  # a row of scores fits the registers


class Tile(NamedTuple):
    """BM positions and BC channels of the result, BK terms of a score at a time."""

    BM: int
    BK: int
    BC: int
    warps: int
    stages: int


# positions of the batch -> the tile that was fastest for that many on an H200; beyond, torch is faster
TILES = {256: Tile(16, 64, 64, 4, 3), 2048: Tile(64, 64, 128, 8, 3)}


@triton.jit
def attention_kernel(
    qkv_ptr, out_ptr, scale, P, C,
    KEYS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Programs: channels x positions x batch; KEYS >= P."""
    b = tl.program_id(2).to(tl.int64)
    m, key, c = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, KEYS), tl.arange(0, BK)
    rows = qkv_ptr + b * P * 3 * C
    q = rows + m[:, None] * (3 * C) + c[None, :]
    k = rows + C + key[None, :] * (3 * C) + c[:, None]
    scores = tl.zeros([BM, KEYS], tl.float32)
    for c0 in range(0, C, BK):
        x = tl.load(q + c0, mask=(m < P)[:, None], other=0.0)
        y = tl.load(k + c0, mask=(key < P)[None, :], other=0.0)
        if _INTERPRETED:  # its product of bfloat16 is one of their bits
            x, y = x.to(tl.float32), y.to(tl.float32)
        scores = tl.dot(x, y, scores)
    scores = tl.where((key < P)[None, :], scores * (scale * 1.44269504), float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(p, 1)
    n = tl.program_id(0) * BC + tl.arange(0, BC)
    v = tl.load(rows + 2 * C + key[:, None] * (3 * C) + n[None, :], mask=(key < P)[:, None], other=0.0)
    if _INTERPRETED:
        o = tl.dot(p, v.to(tl.float32))
    else:
        o = tl.dot(p.to(v.dtype), v)
    o = o / total[:, None]
    tl.store(out_ptr + (b * P + m[:, None]) * C + n[None, :], cast(o, out_ptr.dtype.element_ty), mask=(m < P)[:, None])


@functools.cache
def fits(device: torch.device) -> bool:
    """Whether its shared memory is that of an A100 or more: the tiles need some 120 KB."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_multiprocessor", 0) >= 160 << 10  # some versions of torch do not say


def tile(batch: int, positions: int, channels: int, device: torch.device) -> Tile | None:
    """How to cut it; None where torch's own is faster, it does not fit, or the channels are not a multiple of 16."""
    found = next((tile for most, tile in TILES.items() if batch * positions <= most), None)
    unit = channels & -channels  # the largest power of two that divides them
    if found is None or positions > POSITIONS or unit < 16 or not fits(device):
        return None
    return found._replace(BK=min(found.BK, unit), BC=min(found.BC, unit))


def attention(out: Tensor, qkv: Tensor, tile: Tile) -> Tensor:
    """out [B, P, C] <- softmax(q k^T / sqrt(C)) v; q, k, v: thirds of qkv [B, P, 3C]. Contiguous, half precision."""
    batch, positions, channels = out.shape
    launch(
        attention_kernel,
        (channels // tile.BC, triton.cdiv(positions, tile.BM), batch),
        out,
        qkv_ptr=qkv,
        out_ptr=out,
        scale=channels**-0.5,
        P=positions,
        C=channels,
        KEYS=max(16, triton.next_power_of_2(positions)),
        BM=tile.BM,
        BK=tile.BK,
        BC=tile.BC,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
