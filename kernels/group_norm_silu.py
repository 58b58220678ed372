"""GroupNorm + SiLU, forward and backward, on one tensor or a pair read as its concatenation.

Forward: moments (mean, M2) of every channel in chunks of its pixels, merged by Chan's formula into the
groups' mean and 1/std, then one pass that normalises. A channel's moments do not know of groups, so a group
may straddle the seam of a pair, and a shift only moves a mean. Backward likewise: sums of every channel,
then of the groups, then one pass. Nothing is added atomically, and the order of a sum does not depend on the
batch: the same input gives the same bits.

A tile is [CB channels, PB pixels] of one sample, in NCHW and in channels_last: only the strides differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pixels import INTERPRETED, cast

# Elements of a tile, of a small and of a large tensor: enough programs for the one, loads in flight for the other.
SMALL, LARGE = (1 << 18, 1 << 18) if INTERPRETED else (4096, 16384)
LARGE_SAMPLE = 1 << 20  # elements
REDUCED = 4096  # elements of a tile of partial results


class Part(NamedTuple):
    """One tensor of a pair: its channels from `first` on, and the launch of a kernel over its tiles."""

    h: Tensor
    first: int
    grid: tuple[int]
    tiles: dict[str, Any]  # C, N, chunks, blocks, CB, PB, PLANAR, num_warps


def parts(h: Tensor, h2: Tensor | None, tensors: int) -> tuple[list[Part], int, int]:
    """The parts, and the chunks and pixels a chunk they share; `tensors` are held in registers at a time."""
    both = [h] if h2 is None else [h, h2]
    batch, _, height, width = h.shape
    pixels = height * width
    channels = sum(t.shape[1] for t in both)
    planar = h.is_contiguous()
    tile = (LARGE if pixels * channels >= LARGE_SAMPLE else SMALL) // tensors
    widest = triton.next_power_of_2(max(t.shape[1] for t in both))
    if planar:
        pb = min(tile, triton.next_power_of_2(pixels))
        cb = min(tile // pb, widest)
    else:
        cb = min(64, widest, tile)
        pb = min(tile // cb, triton.next_power_of_2(pixels))
    chunks = triton.cdiv(pixels, pb)
    result, first = [], 0
    for t in both:
        blocks = triton.cdiv(t.shape[1], cb)
        tiles = {"C": t.shape[1], "N": pixels, "chunks": chunks, "blocks": blocks, "CB": cb, "PB": pb}
        warps = max(1, min(8, cb * pb * tensors // 512))
        result.append(Part(t, first, (batch * blocks * chunks,), {**tiles, "PLANAR": planar, "num_warps": warps}))
        first += t.shape[1]
    return result, chunks, pb


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Fused multiply-adds are welcome here, unlike in the noise."""
    with torch.cuda.device_of(like):
        kernel[grid](**arguments, enable_fp_fusion=True)


@triton.jit
def locate(chunks, blocks, PLANAR: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The program's sample, block of channels, and chunk of pixels; neighbours in memory are neighbours here."""
    program = tl.program_id(0)
    if LAST_FIRST:  # what the pass before read last is still in the cache
        program = tl.num_programs(0) - 1 - program
    b = program // (chunks * blocks)
    if PLANAR:
        return b, program // chunks % blocks, program % chunks
    else:
        return b, program % blocks, program // blocks % chunks


@triton.jit
def addresses(b, block, chunk, first, C, N, CB: tl.constexpr, PB: tl.constexpr, PLANAR: tl.constexpr):
    """A tile's corner in a tensor of C channels of which `first` come before, and its offsets [CB, PB] from there."""
    i, j = tl.arange(0, CB)[:, None], tl.arange(0, PB)[None, :]
    channel, pixel = block.to(tl.int64) * CB + first, chunk.to(tl.int64) * PB
    if PLANAR:
        return (b.to(tl.int64) * C + channel) * N + pixel, i * N + j
    else:
        return (b.to(tl.int64) * N + pixel) * C + channel, j * C + i


@triton.jit
def channels_and_mask(block, chunk, C, N, CB: tl.constexpr, PB: tl.constexpr):
    c, p = block * CB + tl.arange(0, CB), chunk * PB + tl.arange(0, PB)
    return c, (c < C)[:, None] & (p < N)[None, :]


@triton.jit
def per_channel(ptr, index, mask):
    """A parameter, float32 [CB]; 0 where it was not given."""
    if ptr is None:
        return tl.zeros(index.shape, tl.float32)
    else:
        return tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(x * -1.0))


@triton.jit
def moments_kernel(
    h_ptr, residual_ptr, shift_ptr, s_ptr, mean_ptr, m2_ptr, first, C_ALL,
    C, N, chunks, blocks, CB: tl.constexpr, PB: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of each channel in each chunk, float32 [B, C_ALL, chunks]; with a residual, of s, which is stored."""
    b, block, chunk = locate(chunks, blocks, PLANAR, False)
    c, mask = channels_and_mask(block, chunk, C, N, CB, PB)
    corner, offsets = addresses(b, block, chunk, 0, C, N, CB, PB, PLANAR)
    x = tl.load(h_ptr + corner + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if shift_ptr is not None:
            x = x + per_channel(shift_ptr, b * C_ALL + first + c, c < C)[:, None]
        x = x + tl.load(residual_ptr + corner + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = cast(x, s_ptr.dtype.element_ty)
        tl.store(s_ptr + corner + offsets, rounded, mask=mask)
        x = tl.where(mask, rounded.to(tl.float32), 0.0)
    n = tl.minimum(N - chunk * PB, PB).to(tl.float32)
    mean = tl.sum(x, 1) / n
    d = tl.where(mask, x - mean[:, None], 0.0)
    at = (b.to(tl.int64) * C_ALL + first + c) * chunks + chunk
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(m2_ptr + at, tl.sum(d * d, 1), mask=c < C)


@triton.jit
def groups_kernel(
    channel_mean_ptr, m2_ptr, shift_ptr, mean_ptr, rstd_ptr, count, eps, C_ALL, groups, width, N, chunks,
    PB: tl.constexpr, CB: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """Chan's merge of a group's width x chunks moments, in two passes: mean, 1/std, float32 [B, groups]."""
    program = tl.program_id(0)
    b, first = program // groups, program % groups * width
    total = tl.zeros([CB, SB], tl.float32)
    for c0 in range(0, width, CB):
        for s0 in range(0, chunks, SB):
            i, s = c0 + tl.arange(0, CB), s0 + tl.arange(0, SB)
            c = b * C_ALL + first + i
            mask = (i < width)[:, None] & (s < chunks)[None, :]
            n = tl.minimum(N - s * PB, PB).to(tl.float32)[None, :]
            at = c.to(tl.int64)[:, None] * chunks + s[None, :]
            mean = tl.load(channel_mean_ptr + at, mask=mask, other=0.0)
            mean = mean + per_channel(shift_ptr, c, i < width)[:, None]
            total = total + tl.where(mask, n * mean, 0.0)
    group_mean = tl.sum(tl.sum(total, 1), 0) / count
    total = tl.zeros([CB, SB], tl.float32)
    for c0 in range(0, width, CB):
        for s0 in range(0, chunks, SB):
            i, s = c0 + tl.arange(0, CB), s0 + tl.arange(0, SB)
            c = b * C_ALL + first + i
            mask = (i < width)[:, None] & (s < chunks)[None, :]
            n = tl.minimum(N - s * PB, PB).to(tl.float32)[None, :]
            at = c.to(tl.int64)[:, None] * chunks + s[None, :]
            mean = tl.load(channel_mean_ptr + at, mask=mask, other=0.0)
            d = mean + per_channel(shift_ptr, c, i < width)[:, None] - group_mean
            m2 = tl.load(m2_ptr + at, mask=mask, other=0.0)
            total = total + tl.where(mask, m2 + n * d * d, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / count
    tl.store(mean_ptr + program, group_mean)
    tl.store(rstd_ptr + program, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def normalise_kernel(
    h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, out_ptr, groups, width, first, C_ALL,
    PAIR: tl.constexpr, SILU: tl.constexpr,
    C, N, chunks, blocks, CB: tl.constexpr, PB: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    b, block, chunk = locate(chunks, blocks, PLANAR, True)
    c, mask = channels_and_mask(block, chunk, C, N, CB, PB)
    corner, offsets = addresses(b, block, chunk, 0, C, N, CB, PB, PLANAR)
    x = tl.load(h_ptr + corner + offsets, mask=mask, other=0.0).to(tl.float32)
    real = c < C
    c = c + first
    group = b * groups + c // width
    scale = per_channel(rstd_ptr, group, real) * per_channel(weight_ptr, c, real)
    if shift_ptr is not None:
        x = x + per_channel(shift_ptr, b * C_ALL + c, real)[:, None]
    x = (x - per_channel(mean_ptr, group, real)[:, None]) * scale[:, None] + per_channel(bias_ptr, c, real)[:, None]
    if SILU:
        x = x / (1.0 + tl.exp(x * -1.0))
    if PAIR:
        corner, offsets = addresses(b, block, chunk, first, C_ALL, N, CB, PB, PLANAR)
    tl.store(out_ptr + corner + offsets, cast(x, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient(
    b, block, chunk, grad_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, groups, width, first, C_ALL,
    PAIR: tl.constexpr, SILU: tl.constexpr, C, N, CB: tl.constexpr, PB: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    """x_hat and g = grad act'(n) of a tile, n = weight x_hat + bias; and weight, rstd [CB]."""
    c, mask = channels_and_mask(block, chunk, C, N, CB, PB)
    corner, offsets = addresses(b, block, chunk, 0, C, N, CB, PB, PLANAR)
    x = tl.load(h_ptr + corner + offsets, mask=mask, other=0.0).to(tl.float32)
    if PAIR:
        corner, offsets = addresses(b, block, chunk, first, C_ALL, N, CB, PB, PLANAR)
    g = tl.load(grad_ptr + corner + offsets, mask=mask, other=0.0).to(tl.float32)
    real = c < C
    c = c + first
    group = b * groups + c // width
    weight, rstd = per_channel(weight_ptr, c, real), per_channel(rstd_ptr, group, real)
    if shift_ptr is not None:
        x = x + per_channel(shift_ptr, b * C_ALL + c, real)[:, None]
    x = tl.where(mask, (x - per_channel(mean_ptr, group, real)[:, None]) * rstd[:, None], 0.0)
    if SILU:
        n = x * weight[:, None] + per_channel(bias_ptr, c, real)[:, None]
        sigma = sigmoid(n)
        g = g * sigma * (1.0 + n * (1.0 - sigma))
    return x, g, weight, rstd


@triton.jit
def sums_kernel(
    grad_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, g_ptr, gx_ptr, x_ptr,
    groups, width, first, C_ALL, PAIR: tl.constexpr, SILU: tl.constexpr,
    C, N, chunks, blocks, CB: tl.constexpr, PB: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    """sum g and sum g x_hat of each channel and chunk, float32 [B, C_ALL, chunks]; for dshift, of x_hat."""
    b, block, chunk = locate(chunks, blocks, PLANAR, False)
    x, g, _, _ = gradient(
        b, block, chunk, grad_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, groups, width, first,
        C_ALL, PAIR, SILU, C, N, CB, PB, PLANAR,
    )  # fmt: skip
    c, _ = channels_and_mask(block, chunk, C, N, CB, PB)
    at = (b.to(tl.int64) * C_ALL + first + c) * chunks + chunk
    tl.store(g_ptr + at, tl.sum(g, 1), mask=c < C)
    tl.store(gx_ptr + at, tl.sum(g * x, 1), mask=c < C)
    if x_ptr is not None:
        tl.store(x_ptr + at, tl.sum(x, 1), mask=c < C)


@triton.jit
def sum_chunks(ptr, c, real, chunks, CB: tl.constexpr, SB: tl.constexpr):
    """The sum over its chunks of each channel c of [B C_ALL], float32 [CB]."""
    total = tl.zeros([CB, SB], tl.float32)
    for s0 in range(0, chunks, SB):
        s = s0 + tl.arange(0, SB)
        at = c.to(tl.int64)[:, None] * chunks + s[None, :]
        total = total + tl.load(ptr + at, mask=real[:, None] & (s < chunks)[None, :], other=0.0)
    return tl.sum(total, 1)


@triton.jit
def group_sums_kernel(
    g_ptr, gx_ptr, x_ptr, weight_ptr, rstd_ptr, mean_wg_ptr, mean_wgx_ptr, dweight_ptr, dbias_ptr, dshift_ptr,
    count, N, C_ALL, groups, width, chunks, CB: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """<w g> and <w g x_hat> of a group, float32 [B, groups]; dweight, dbias, dshift of its channels, [B, C_ALL]."""
    program = tl.program_id(0)
    b, first = program // groups, program % groups * width
    mean_wg, mean_wgx = tl.zeros([CB], tl.float32), tl.zeros([CB], tl.float32)
    for c0 in range(0, width, CB):
        i = c0 + tl.arange(0, CB)
        c, real = b * C_ALL + first + i, i < width
        weight = per_channel(weight_ptr, first + i, real)
        g, gx = sum_chunks(g_ptr, c, real, chunks, CB, SB), sum_chunks(gx_ptr, c, real, chunks, CB, SB)
        tl.store(dbias_ptr + c, g, mask=real)
        tl.store(dweight_ptr + c, gx, mask=real)
        mean_wg, mean_wgx = mean_wg + weight * g, mean_wgx + weight * gx
    group_wg, group_wgx = tl.sum(mean_wg, 0) / count, tl.sum(mean_wgx, 0) / count
    tl.store(mean_wg_ptr + program, group_wg)
    tl.store(mean_wgx_ptr + program, group_wgx)
    if dshift_ptr is not None:
        rstd = tl.load(rstd_ptr + program)
        for c0 in range(0, width, CB):
            i = c0 + tl.arange(0, CB)
            c, real = b * C_ALL + first + i, i < width
            wg = per_channel(weight_ptr, first + i, real) * sum_chunks(g_ptr, c, real, chunks, CB, SB)
            x = sum_chunks(x_ptr, c, real, chunks, CB, SB)
            tl.store(dshift_ptr + c, (wg - N * group_wg - x * group_wgx) * rstd, mask=real)


@triton.jit
def backward_kernel(
    grad_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, grad_s_ptr, mean_wg_ptr, mean_wgx_ptr, dh_ptr,
    groups, width, first, C_ALL, PAIR: tl.constexpr, SILU: tl.constexpr,
    C, N, chunks, blocks, CB: tl.constexpr, PB: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    """dh = (w g - <w g> - x_hat <w g x_hat>) / std + grad_s."""
    b, block, chunk = locate(chunks, blocks, PLANAR, True)
    x, g, weight, rstd = gradient(
        b, block, chunk, grad_ptr, h_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, groups, width, first,
        C_ALL, PAIR, SILU, C, N, CB, PB, PLANAR,
    )  # fmt: skip
    c, mask = channels_and_mask(block, chunk, C, N, CB, PB)
    group = b * groups + (first + c) // width
    mean_wg, mean_wgx = per_channel(mean_wg_ptr, group, c < C), per_channel(mean_wgx_ptr, group, c < C)
    dh = (weight[:, None] * g - mean_wg[:, None] - x * mean_wgx[:, None]) * rstd[:, None]
    if grad_s_ptr is not None:
        corner, offsets = addresses(b, block, chunk, first, C_ALL, N, CB, PB, PLANAR)
        dh = dh + tl.load(grad_s_ptr + corner + offsets, mask=mask, other=0.0).to(tl.float32)
    corner, offsets = addresses(b, block, chunk, 0, C, N, CB, PB, PLANAR)
    tl.store(dh_ptr + corner + offsets, cast(dh, dh_ptr.dtype.element_ty), mask=mask)


def _reduced_tile(width: int, chunks: int) -> dict[str, int]:
    cb = min(triton.next_power_of_2(width), 32)
    return {"CB": cb, "SB": min(triton.next_power_of_2(chunks), REDUCED // cb)}


def _forward(
    out: Tensor,
    s: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    h2: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> None:
    batch, channels = out.shape[:2]
    width = channels // groups
    pieces, chunks, pb = parts(h, h2, 1)
    pixels = h.shape[2] * h.shape[3]
    channel_mean, m2 = torch.empty((2, batch, channels, chunks), dtype=torch.float32, device=h.device)
    for part in pieces:
        launch(
            moments_kernel,
            part.grid,
            h,
            h_ptr=part.h,
            residual_ptr=residual,
            shift_ptr=shift,
            s_ptr=s,
            mean_ptr=channel_mean,
            m2_ptr=m2,
            first=part.first,
            C_ALL=channels,
            **part.tiles,
        )
    if s is not None:
        pieces, shift = [pieces[0]._replace(h=s)], None
    launch(
        groups_kernel,
        (batch * groups,),
        h,
        channel_mean_ptr=channel_mean,
        m2_ptr=m2,
        shift_ptr=shift,
        mean_ptr=mean,
        rstd_ptr=rstd,
        count=float(width * pixels),
        eps=eps,
        C_ALL=channels,
        groups=groups,
        width=width,
        N=pixels,
        chunks=chunks,
        PB=pb,
        **_reduced_tile(width, chunks),
    )
    for part in pieces:
        launch(
            normalise_kernel,
            part.grid,
            h,
            h_ptr=part.h,
            shift_ptr=shift,
            weight_ptr=weight,
            bias_ptr=bias,
            mean_ptr=mean,
            rstd_ptr=rstd,
            out_ptr=out,
            groups=groups,
            width=width,
            first=part.first,
            C_ALL=channels,
            PAIR=h2 is not None,
            SILU=silu,
            **part.tiles,
        )


def group_norm_silu(
    outs: tuple[Tensor, Tensor, Tensor],
    h: Tensor,
    h2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> None:
    """out = act(GroupNorm(cat(h, h2) + shift)), and the groups' mean and 1/std, float32 [B, groups]."""
    out, mean, rstd = outs
    _forward(out, None, mean, rstd, h, h2, None, weight, bias, groups, eps, shift, silu)


def add_group_norm_silu(
    outs: tuple[Tensor, Tensor, Tensor, Tensor],
    h: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> None:
    """s = h + shift + residual, rounded to h's dtype; out = act(GroupNorm(s))."""
    out, s, mean, rstd = outs
    _forward(out, s, mean, rstd, h, None, residual, weight, bias, groups, eps, shift, silu)


def group_norm_silu_backward(
    outs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    h: Tensor,
    h2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    shift: Tensor | None,
    silu: bool,
    grad_s: Tensor | None,
) -> None:
    """dh and dh2 (grad_s added), dweight, dbias, dshift."""
    dh, dh2, dweight, dbias, dshift = outs
    batch, channels = grad.shape[:2]
    width = channels // groups
    pieces, chunks, _ = parts(h, h2, 2)
    pixels = h.shape[2] * h.shape[3]
    g, gx = torch.empty((2, batch, channels, chunks), dtype=torch.float32, device=h.device)
    x = None if dshift is None else torch.empty_like(g)
    dweights, dbiases = torch.empty((2, batch, channels), dtype=torch.float32, device=h.device)
    mean_wg, mean_wgx = torch.empty((2, batch, groups), dtype=torch.float32, device=h.device)
    given = {
        "grad_ptr": grad,
        "shift_ptr": shift,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "groups": groups,
        "width": width,
        "C_ALL": channels,
        "PAIR": h2 is not None,
        "SILU": silu,
    }
    for part in pieces:
        launch(
            sums_kernel,
            part.grid,
            h,
            h_ptr=part.h,
            first=part.first,
            g_ptr=g,
            gx_ptr=gx,
            x_ptr=x,
            **given,
            **part.tiles,
        )
    launch(
        group_sums_kernel,
        (batch * groups,),
        h,
        g_ptr=g,
        gx_ptr=gx,
        x_ptr=x,
        weight_ptr=weight,
        rstd_ptr=rstd,
        mean_wg_ptr=mean_wg,
        mean_wgx_ptr=mean_wgx,
        dweight_ptr=dweights,
        dbias_ptr=dbiases,
        dshift_ptr=dshift,
        count=float(width * pixels),
        N=pixels,
        C_ALL=channels,
        groups=groups,
        width=width,
        chunks=chunks,
        **_reduced_tile(width, chunks),
    )
    torch.sum(dweights, 0, out=dweight)
    torch.sum(dbiases, 0, out=dbias)
    for part, d in zip(pieces, (dh, dh2), strict=False):
        launch(
            backward_kernel,
            part.grid,
            h,
            h_ptr=part.h,
            first=part.first,
            grad_s_ptr=grad_s,
            mean_wg_ptr=mean_wg,
            mean_wgx_ptr=mean_wgx,
            dh_ptr=d,
            **given,
            **part.tiles,
        )
