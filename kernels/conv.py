"""Convolutions of few positions, channels_last: split over their channels, so that the whole GPU reads the weights.

    out[b, p, n] = sum_{tap, c} W[n, tap, c] h[b, stride p + tap - pad, c]  +  sum_{k, c} V_k[n, c] s_k[b, p, c]
                   + bias[n] + residual[b, p, n]

A matrix product with the positions as rows, whose left factor is read where it lies (implicit GEMM); the products
V_k s_k, 1x1 convolutions of other tensors, are more of the same sum. A program has a tile of the result and a part
of the sum. Where the parts are several, each is written in float32 and a second kernel adds them in order: the same
input gives the same bits.

The transposed 4x4 convolution of stride 2 is four convolutions 2x2, one for each parity of (row, column).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import launch
from .pixels import _INTERPRETED, cast


class Plan(NamedTuple):
    """How a convolution is cut: a tile of [BM positions, BN channels], BK terms at a time, `split` parts."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    split: int = 1


@triton.jit
def accumulate(
    acc, h_ptr, w_ptr, first, last, b, y, x, n, H, W, C, N, SIDE: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """acc + terms first..last-1, BK each, of the convolution SIDE x SIDE whose first tap of each row is (y, x)."""
    blocks = tl.cdiv(C, BK)
    j = tl.arange(0, BK)
    h_rows = h_ptr + b.to(tl.int64) * H * W * C
    w_rows = w_ptr + n.to(tl.int64) * (SIDE * SIDE) * C
    for i in range(first, last):
        tap = i // blocks
        c = (i - tap * blocks) * BK + j
        u, v = y + tap // SIDE, x + tap % SIDE
        inside = ((u >= 0) & (u < H) & (v >= 0) & (v < W))[:, None]
        real = (n < N)[None, :]
        if not EVEN:
            inside = inside & (c < C)[None, :]
            real = real & (c < C)[:, None]
        a = tl.load(h_rows[:, None] + (((u * W + v) * C)[:, None] + c[None, :]), mask=inside, other=0.0)
        w = tl.load(w_rows[None, :] + (tap * C + c)[:, None], mask=real, other=0.0)
        if _INTERPRETED:  # its product of bfloat16 is one of their bits
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc)
    return acc


@triton.jit
def finish(acc, bias_ptr, residual_ptr, out_ptr, at, n, mask, N):
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc = acc + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "split"])
def conv_kernel(
    h_ptr, w_ptr, s1_ptr, v1_ptr, s2_ptr, v2_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
    M, H, W, OH, OW, C, C1, C2, N, split,
    SIDE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
    EVEN: tl.constexpr, EVEN1: tl.constexpr, EVEN2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Programs: tiles x parts x parities. M = B OH OW rows, of a result [B, OH, OW, N] or, UP, of a quarter of it."""
    columns = tl.cdiv(N, BN)
    tile, part, parity = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile // columns * BM + tl.arange(0, BM)
    n = tile % columns * BN + tl.arange(0, BN)
    b, p, q = m // (OH * OW), m // OW % OH, m % OW
    if UP:
        y, x = p - 1 + parity // 2, q - 1 + parity % 2
        w_ptr += parity.to(tl.int64) * N * (SIDE * SIDE) * C
        row = (b * (2 * OH) + 2 * p + parity // 2) * (2 * OW) + 2 * q + parity % 2
    else:
        y, x = p * STRIDE - SIDE // 2, q * STRIDE - SIDE // 2
        row = m
    y = tl.where(m < M, y, -SIDE)  # rows that do not exist lie outside
    # the sum's terms, BK at a time: of the convolution, then of the products; this part has first..last-1 of them
    terms, terms1, terms2 = SIDE * SIDE * tl.cdiv(C, BK), 0, 0
    if s1_ptr is not None:
        terms1 = tl.cdiv(C1, BK)
    if s2_ptr is not None:
        terms2 = tl.cdiv(C2, BK)
    first, last = 0, terms + terms1 + terms2
    if parts_ptr is not None:
        share = tl.cdiv(last, split)
        first = part * share
        last = tl.minimum(first + share, last)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = accumulate(acc, h_ptr, w_ptr, first, tl.minimum(last, terms), b, y, x, n, H, W, C, N, SIDE, BK, EVEN)
    if s1_ptr is not None:
        p = tl.where(m < M, p, -1)
        first, last = first - terms, last - terms
        end = tl.minimum(last, terms1)
        acc = accumulate(acc, s1_ptr, v1_ptr, tl.maximum(first, 0), end, b, p, q, n, OH, OW, C1, N, 1, BK, EVEN1)
    if s2_ptr is not None:
        first, last = first - terms1, last - terms1
        acc = accumulate(acc, s2_ptr, v2_ptr, tl.maximum(first, 0), last, b, p, q, n, OH, OW, C2, N, 1, BK, EVEN2)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + n[None, :]
    if parts_ptr is not None:
        size = M.to(tl.int64) * N * tl.num_programs(2)
        tl.store(parts_ptr + part * size + at, acc, mask=mask)
    else:
        finish(acc, bias_ptr, residual_ptr, out_ptr, at, n, mask, N)


@triton.jit
def sum_kernel(parts_ptr, bias_ptr, residual_ptr, out_ptr, size, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of the parts + bias + residual; out += bias + residual where there are no parts."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    if parts_ptr is None:
        acc = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(SPLIT):
            acc += tl.load(parts_ptr + k * size + at, mask=mask, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def conv2d(
    out: Tensor,
    h: Tensor,
    weight: Tensor,
    plan: Plan,
    stride: int = 1,
    products: Sequence[tuple[Tensor, Tensor]] = (),
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """out <- W * h + sum_k V_k s_k + bias + residual.

    Tensors are channels_last; weight [N, C, S, S] too, S odd, or, for the transposed convolution, as `parities` gives
    it. products: at most two of (s_k, V_k [N, C_k, 1, 1]). bias [N].
    """
    up = weight.ndim == 5
    batch, channels, height, width = h.shape
    count, rows, columns = out.shape[1:]
    side = 2 if up else weight.shape[-1]
    if up:
        rows, columns = height, width
    M = batch * rows * columns
    tiles = triton.cdiv(M, plan.BM) * triton.cdiv(count, plan.BN)
    (s1, v1), (s2, v2) = [*products, (None, None), (None, None)][:2]
    c1, c2 = (0 if s is None else s.shape[1] for s in (s1, s2))
    parts = None
    if plan.split > 1:
        parts = torch.empty(plan.split * out.numel(), dtype=torch.float32, device=out.device)
    launch(
        conv_kernel,
        (tiles, plan.split, 4 if up else 1),
        out,
        h_ptr=h,
        w_ptr=weight,
        s1_ptr=s1,
        v1_ptr=v1,
        s2_ptr=s2,
        v2_ptr=v2,
        bias_ptr=bias if parts is None else None,
        residual_ptr=residual if parts is None else None,
        out_ptr=out,
        parts_ptr=parts,
        M=M,
        H=height,
        W=width,
        OH=rows,
        OW=columns,
        C=channels,
        C1=c1,
        C2=c2,
        N=count,
        split=plan.split,
        SIDE=side,
        STRIDE=stride,
        UP=up,
        EVEN=channels % plan.BK == 0,
        EVEN1=c1 % plan.BK == 0,
        EVEN2=c2 % plan.BK == 0,
        BM=plan.BM,
        BN=plan.BN,
        BK=plan.BK,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return out if parts is None else add(out, bias, residual, parts, plan.split)


def add(
    out: Tensor, bias: Tensor | None, residual: Tensor | None, parts: Tensor | None = None, split: int = 0
) -> Tensor:
    """out += bias + residual, of channels_last tensors; or out <- the sum of the parts + bias + residual."""
    size, block = out.numel(), 1024 if out.numel() < 1 << 21 else 2048
    launch(
        sum_kernel,
        (triton.cdiv(size, block),),
        out,
        parts_ptr=parts,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        size=size,
        N=out.shape[1],
        SPLIT=split,
        BLOCK=block,
        num_warps=4,
    )
    return out


def plan(
    M: int, N: int, channels: Sequence[int], programs: int, stride: int = 1, up: bool = False, sums: bool = False
) -> Plan | None:
    """The plan worth trying against cuDNN; None where cuDNN is faster. Both as measured on an H200, in bfloat16.

    M: positions (of the input, where up). N, channels: of the result, and of h and the s_k. programs: as many as the
    GPU runs at a time. sums: whether there is a residual or a product.
    """
    size = 4 * M * N if up else M * N
    taps = 4 if up else 9
    if min(channels) < 64 or M > 1 << 17 or (size > 1 << 21 and stride == 1 and not (sums and len(channels) > 1)):
        return None
    if N <= 32 or (N <= 64 and size <= 1 << 18):
        found = Plan(64, 32, 64, 4, 5)
    elif M <= 64 and not up:
        found = Plan(64, 32, 64, 4, 5) if len(channels) == 1 and channels[0] <= 512 else Plan(64, 64, 64, 4, 4)
    elif size > 1 << 20 or (size == 1 << 20 and not up):
        if N > 64 and not up and stride == 1:
            found = Plan(128, 128, 64, 8, 4)
        else:
            found = Plan(64, 64, 64, 4, 4) if sums and size == 1 << 20 else Plan(128, 64, 64, 4, 4)
    elif all(c % 128 == 0 for c in channels):
        found = Plan(64, 64, 128, 4, 3)
    else:
        found = Plan(64, 64, 64, 4, 4)
    # parts: a tile a processor, two where the tiles are small and the sums long; none of them short or empty
    K = taps * channels[0] + sum(channels[1:])
    tiles = triton.cdiv(M, found.BM) * triton.cdiv(N, found.BN) * (4 if up else 1)
    wanted = (2 if found.BM == 64 < M and K > 1700 else 1) * programs // tiles
    terms = taps * triton.cdiv(channels[0], found.BK) + sum(triton.cdiv(c, found.BK) for c in channels[1:])
    split = max(1, min(wanted, K // 256))
    return found._replace(split=triton.cdiv(terms, triton.cdiv(terms, split)))


def parities(weight: Tensor) -> Tensor:
    """The transposed kernel [C, N, 4, 4] of stride 2 and padding 1 as four kernels, [4, N, 2, 2, C] in memory.

    Pixel 2p + d of the result sees the pixels p - 1 + d + j, j = 0, 1, through tap 3 - d - 2j.
    """
    taps = torch.tensor([[3, 1], [2, 0]], device=weight.device)
    kernels = [weight[:, :, taps[d]][..., taps[e]] for d in (0, 1) for e in (0, 1)]
    return torch.stack(kernels).permute(0, 2, 3, 4, 1).contiguous()
