"""The fused ops: one contract (contract.py), checked once; the homes in `backend.py` trust their caller.

Tensors are [B, C, H, W]. Every op is registered with torch.library, so it works under torch.compile and autograd.
`seed` is an int (sample i uses seed + i), B ints, or an int64 tensor [B] holding the 64 bits; `step`, `alpha_t`,
`gamma_t`, `gamma` and `row` are host values or tensors. A tensor on the GPU is read by the kernel and never
copied to the host, so a captured CUDA graph replays with new values (and its range cannot be checked).
`origin` is the place (h, w) of a tile in the whole image. `out=` and `into=` are for inference: `out` receives
the result, `into` (a view of the network's input, any dtype and layout) a copy of it in the same pass.
Gradients are those of reverse mode, once: to images, norm parameters and shift, never to alpha, gamma or a row. A
tangent of forward mode is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise as noise_v1
from .contract import (
    FLOATS,
    Origin,
    Pair,
    Seed,
    as_alpha_gamma,
    as_dense,
    as_device,
    as_float64,
    as_gamma,
    as_int64,
    as_integer,
    as_like,
    as_origin,
    as_pair,
    as_seed,
    as_step,
    check_channels,
    check_constant,
    check_device,
    check_image,
    check_norm,
    check_out,
    check_outputs,
    check_scalar_device,
    is_readable,
    layout_of,
    step_inputs,
)
from .native import is_plain_step
from .registration import dispatch, noise_of, q_sample_out, refine_out, solver_step_out, watched

__all__ = ["add_group_norm_silu", "group_norm_silu", "noise", "q_sample", "refine", "solver_step"]


def noise(
    shape: Sequence[int],
    seed: Seed,
    *,
    domain: int = noise_v1.REFINE,
    step: int | Tensor = 0,
    origin: Origin = (0, 0),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise v1: z[i] = noise(seed_i, domain, step)[c, h, w], the same bits on every device and in any batch or tile.

    Equivalent to (other draws)::

        torch.stack([torch.randn(shape[1:], generator=generator_of(seed_i)) for seed_i in seeds])

    Args:
        shape: [B, C, H, W], C <= 65536.
        domain: 0 y_T, 1 refinement, 2 training eps, 3 training t and gamma, 4 augmentation.
        step: 0 .. 2^32 - 1.
        dtype: float32, float16 or bfloat16; drawn in float32, then rounded.

    Returns:
        [B, C, H, W], NCHW.

    Raises:
        ValueError, TypeError: shape, seed, domain, step, origin or dtype out of range.
    """
    if len(shape) != 4 or any(n < 0 for n in shape):
        raise ValueError(f"shape must be [B, C, H, W]: got {tuple(shape)}")
    check_channels(shape[1])
    if dtype not in FLOATS:
        raise TypeError(f"noise comes in float32, float16 or bfloat16: got {dtype}")
    domain = as_integer("domain", domain)
    if not 0 <= domain < 65536:
        raise ValueError(f"domain must be in 0 .. 65535: got {domain}")
    device = as_device(device)
    seed, step = as_seed(seed, shape[0], device), as_step(step, 0, device)
    place = (domain, *as_origin(origin, shape))
    if not watched():
        return noise_of(seed, step, shape, *place, dtype, device)
    return torch.ops.sr3fast.noise(as_int64(seed), as_int64(step), list(shape), *place, dtype, device)


def refine(
    y_t: Tensor,
    eps_hat: Tensor,
    alpha_t: float | Tensor,
    gamma_t: float | Tensor,
    seed: Seed | None,
    step: int | Tensor,
    *,
    z: Tensor | None = None,
    origin: Origin = (0, 0),
    out: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """One refinement step of SR3 (Saharia et al. 2021, Algorithm 2, line 4), noise included, in one pass.

        y_{t-1} = (y_t - (1 - alpha_t)/sqrt(1 - gamma_t) eps_hat)/sqrt(alpha_t) + sqrt(1 - alpha_t) z

    Equivalent to (other draws)::

        z = torch.randn_like(y_t) if step > 1 else 0
        y = (y_t - (1 - alpha_t) / sqrt(1 - gamma_t) * eps_hat) / sqrt(alpha_t) + sqrt(1 - alpha_t) * z

    Args:
        y_t: [B, C, H, W] float32, NCHW or channels_last. The result has its layout.
        eps_hat: f_theta(x, y_t, gamma_t), the same shape, float32, float16 or bfloat16, any strides.
        alpha_t, gamma_t: 0 < gamma_t < 1, gamma_t <= alpha_t <= 1.
        seed: may be None where z is given.
        step: counts down to 1; at 1 no noise is added.
        z: noise from outside, in place of noise v1.
        out: float32, y_t's layout; may be y_t itself.
        into: [B, C, H, W], any float dtype and strides.

    Raises:
        ValueError, TypeError: see the ranges above.
    """
    plain = out is not None and z is into is None and not watched() and is_plain_step(out, y_t, eps_hat)
    y, eps_hat, seed, z, origin = step_inputs("y_t", y_t, eps_hat, seed, z, origin, plain)
    alpha, gamma = as_alpha_gamma(alpha_t, gamma_t, y.device)
    step = as_step(step, 1, y.device)
    if out is not None or into is not None:
        if not plain:
            out = check_outputs(y, {"y_t": y_t, "eps_hat": eps_hat, "z": z}, out, into)
        if plain or not watched(y, eps_hat, z, out, into):
            refine_out(y, eps_hat, alpha, gamma, seed, step, z, *origin, out, into)
            return out  # type: ignore[return-value]
    args = (y, eps_hat, as_float64(alpha), as_float64(gamma), as_int64(seed), as_int64(step), z, *origin)
    if out is None:
        return torch.ops.sr3fast.refine(*args)
    dispatch("refine_out", args, out, into)
    return out


def solver_step(
    y: Tensor,
    eps_hat: Tensor,
    row: Sequence[float] | Tensor,
    seed: Seed | None,
    step: int | Tensor,
    *,
    history: Sequence[Tensor] = (),
    z: Tensor | None = None,
    origin: Origin = (0, 0),
    out: Tensor | tuple[Tensor, Tensor | None] | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of any solver of `solver.py`, a row of nine numbers (recip, ratio, clip, A, B, C0, C1, C2, S).

        m  = clip(recip y - ratio eps_hat)                       the estimate of y_0; clip = inf for none
        y' = A y + B eps_hat + C0 m + C1 m_{t+1} + C2 m_{t+2} + S z

    in float32, each operation rounded by itself, left to right; a term whose C or S is 0 is left out.

    Equivalent to (other draws)::

        m = (recip * y - ratio * eps_hat).clamp(-clip, clip)
        y = A * y + B * eps_hat + C0 * m + C1 * history[0] + C2 * history[1] + S * torch.randn_like(y)

    Args:
        y, eps_hat, seed, step, z, origin, into: as in `refine`.
        row: nine numbers, or a float32 tensor [9], any stride.
        history: (m_{t+1}, m_{t+2}), as many as the row uses; float32, y's shape.
        out: a tensor for y', or a pair (for y', for m); m_{t+2} may be the one that receives m. With a lone tensor,
            or a pair that ends in None, m is not stored, and an empty tensor is returned in its place.

    Returns:
        y', m: float32, y's layout.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices; a row that reads history that was not given.
    """
    given = y
    y, eps_hat, seed, z, origin = step_inputs("y", y, eps_hat, seed, z, origin)
    if len(history) > 2:
        raise ValueError(f"history holds at most m_(t+1) and m_(t+2): got {len(history)} tensors")
    m1, m2 = [as_like("history", m, y) for m in history] + [None] * (2 - len(history))
    if not isinstance(row, Tensor):
        if len(row) != 9:
            raise ValueError(f"a row is (recip, ratio, clip, A, B, C0, C1, C2, S), nine numbers: got {len(row)}")
        values = row
        if torch.compiler.is_compiling():
            row = torch.stack([as_float64(v) for v in row]).float()
        else:
            row = torch.tensor(row, dtype=torch.float32)
    elif row.shape != (9,) or row.dtype != torch.float32:
        raise ValueError(f"a row tensor must be float32 [9]: got {row.dtype} {tuple(row.shape)}")
    else:
        check_constant("row", row)
        row = row.detach().resolve_neg().contiguous()
        values = row.tolist() if is_readable(row) else ()
    if any(v != v for v in values):
        raise ValueError(f"a row holds numbers: got nan in {tuple(values)}")
    if len(values) > 2 and values[2] < 0:
        raise ValueError(f"clip, the third number of a row, must not be negative: got {values[2]:g}")
    for name, coefficient, m in zip(("C1", "C2"), values[6:8], (m1, m2), strict=False):
        if coefficient != 0 and m is None:
            raise ValueError(f"the row has {name}={coefficient:g} but history holds {len(history)} tensors")
    check_scalar_device("row", row, y.device)
    step = as_step(step, 1, y.device)
    if out is None and into is None:
        return torch.ops.sr3fast.solver_step(y, eps_hat, row, as_int64(seed), as_int64(step), m1, m2, z, *origin)
    y_out, m_out = as_pair(out)
    inputs = {"y": given, "eps_hat": eps_hat, "z": z}
    y_out = check_outputs(y, {**inputs, "m1": m1, "m2": m2}, y_out, into)
    if m_out is not None:
        # an element of m_{t+1}, m_{t+2} is read before the same element of m is written
        others = {**inputs, "m1": m1, "m2": m2, "out": y_out, "into": into}
        check_out("m", m_out, y, others, may_be=("m1", "m2"))
    outs, rest = (y_out, m_out, into), (m1, m2, z, *origin)
    if watched(y, eps_hat, m1, m2, z, *outs):
        dispatch("solver_step_out", (y, eps_hat, row, as_int64(seed), as_int64(step), *rest), *outs)
    else:
        solver_step_out(y, eps_hat, row, seed, step, *rest, *outs)
    return y_out, y.new_empty(0) if m_out is None else m_out


def q_sample(
    y_0: Tensor,
    gamma: float | Tensor,
    seed: Seed | None,
    step: int | Tensor = 0,
    *,
    eps: Tensor | None = None,
    origin: Origin = (0, 0),
    out: Tensor | tuple[Tensor, Tensor | None] | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diffuse: q(y_t given y_0) (Saharia et al. 2021, eq. 4), the noise drawn in registers and returned for the loss.

        y_t = sqrt(gamma) y_0 + sqrt(1 - gamma) eps

    Equivalent to (other draws)::

        eps = torch.randn_like(y_0)
        y_t = gamma.sqrt().view(-1, 1, 1, 1) * y_0 + (1 - gamma).sqrt().view(-1, 1, 1, 1) * eps

    Args:
        y_0: [B, C, H, W] float32, float16 or bfloat16, NCHW or channels_last; y_t and eps have its dtype and layout.
        gamma: 0 < gamma <= 1, one number, or float [B].
        seed: may be None where eps is given.
        step: the training iteration, 0 .. 2^32 - 1.
        eps: noise from outside, in place of noise v1 (domain 2).
        out: a tensor for y_t, or a pair (for y_t, for eps).
        into: [B, C, H, W], any float dtype and strides, receives y_t too.

    Returns:
        y_t, eps.

    Raises:
        ValueError, TypeError: see the ranges above.
    """
    check_image("y_0", y_0, FLOATS)
    y = as_dense(y_0)
    if eps is not None:
        if eps.dtype != y.dtype:
            raise TypeError(f"eps must have y_0's dtype: got {eps.dtype} and {y.dtype}")
        given_eps = eps
        eps = as_like("eps", eps, y, FLOATS)
    elif seed is None:
        raise ValueError("q_sample needs a seed or eps: got neither")
    gamma = as_gamma(gamma, y)
    seed, step = as_seed(0 if seed is None else seed, y.shape[0], y.device), as_step(step, 0, y.device)
    place = as_origin(origin, y.shape)
    if out is None and into is None:
        y_t, drawn = torch.ops.sr3fast.q_sample(y, gamma, as_int64(seed), as_int64(step), eps, *place)
        return y_t, drawn if eps is None else given_eps
    y_out, eps_out = as_pair(out)
    y_out = check_outputs(y, {"y_0": y_0, "eps": eps}, y_out, into)
    if eps is not None and eps_out is not None:
        raise ValueError("out has a place for eps, but eps was given")
    if eps_out is not None:
        check_out("eps", eps_out, y, {"y_0": y_0, "out": y_out, "into": into})
    elif eps is None:
        eps_out = torch.empty_like(y)
    outs = (y_out, eps_out, into)
    if watched(y, eps, *outs):
        dispatch("q_sample_out", (y, gamma, as_int64(seed), as_int64(step), eps, *place), *outs)
    else:
        q_sample_out(y, gamma, seed, step, eps, *place, *outs)
    return y_out, given_eps if eps is not None else eps_out  # type: ignore[return-value]


def group_norm_silu(
    h: Tensor | Pair,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """GroupNorm (Wu and He 2018) and SiLU, forward and backward in fused kernels, statistics in float32.

        s = h + shift;  out = silu((s - mean)/sqrt(var + eps) weight + bias)

    Equivalent to::

        F.silu(F.group_norm(h + shift[:, :, None, None], groups, weight, bias, eps))

    Args:
        h: [B, C, H, W] float32, float16 or bfloat16, NCHW or channels_last; or a pair of tensors, read as their
            concatenation over the channels without making it.
        weight, bias: [C], any float dtype.
        groups: divides C.
        shift: [B, C], any float dtype: a convolution's bias, a noise embedding. Added before the statistics.
        silu: False for the plain norm of attention blocks.

    Returns:
        [B, C, H, W], h's dtype and layout.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; groups that do not divide C.
    """
    first, second = as_pair(h, "h")
    check_image("h", first, FLOATS)
    first = as_dense(first)
    channels = first.shape[1]
    if second is not None:
        check_image("h[1]", second, (first.dtype,))
        check_device("h[1]", second, first.device)
        if second.shape[0] != first.shape[0] or second.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"a pair must agree but for the channels: got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        second = as_dense(second, layout_of(first))
        channels += second.shape[1]
    shift = check_norm(first, channels, weight, bias, groups, eps, shift)
    return torch.ops.sr3fast.group_norm_silu(
        first, second, weight.contiguous(), bias.contiguous(), groups, eps, shift, silu
    )[0]


def add_group_norm_silu(
    h: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """A residual sum and the norm that follows it, in one kernel.

        s = h + shift + residual;  out = silu(GroupNorm(s))

    Equivalent to::

        s = h + shift[:, :, None, None] + residual
        out = F.silu(F.group_norm(s, groups, weight, bias, eps))

    Args:
        h, residual: [B, C, H, W], the same dtype; see `group_norm_silu` for the rest.

    Returns:
        out, s: h's dtype and layout.

    Raises:
        ValueError, TypeError: as `group_norm_silu`.
    """
    check_image("h", h, FLOATS)
    h = as_dense(h)
    residual = as_like("residual", residual, h, (h.dtype,))
    shift = check_norm(h, h.shape[1], weight, bias, groups, eps, shift)
    out, s, _, _ = torch.ops.sr3fast.add_group_norm_silu(
        h, residual, weight.contiguous(), bias.contiguous(), groups, eps, shift, silu
    )
    return out, s
