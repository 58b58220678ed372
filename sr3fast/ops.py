"""The fused ops: one contract, checked once here; the homes in `backend.py` trust their caller.

Tensors are [B, C, H, W]. Every op is registered with torch.library, so it works under torch.compile and autograd.
`seed` is an int (sample i uses seed + i), B ints, or an int64 tensor [B] holding the 64 bits; `step`, `alpha_t`,
`gamma_t`, `gamma` and `row` are host values or tensors. A tensor on the GPU is read by the kernel and never
copied to the host, so a captured CUDA graph replays with new values (and its range cannot be checked).
`origin` is the place (h, w) of a tile in the whole image. `out=` and `into=` are for inference: `out` receives
the result, `into` (a view of the network's input, any dtype and layout) a copy of it in the same pass.
Gradients are those of reverse mode, once: to images, norm parameters and shift, never to alpha, gamma or a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backend
from . import noise as noise_v1

Origin = tuple[int, int]
Seed = int | Sequence[int] | Tensor
Pair = tuple[Tensor, Tensor]

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF)


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
    _check_channels(shape[1])
    if dtype not in FLOATS:
        raise TypeError(f"noise comes in float32, float16 or bfloat16: got {dtype}")
    domain = _integer("domain", domain)
    if not 0 <= domain < 65536:
        raise ValueError(f"domain must be in 0 .. 65535: got {domain}")
    device = torch.device("cpu") if device is None else torch.device(device)
    seed, step = _seed(seed, shape[0], device), _step(step, 0, device)
    place = (domain, *_origin(origin, shape))
    if not _watched():
        return _noise(seed, step, shape, *place, dtype, device)
    return torch.ops.sr3fast.noise(_int64(seed), _int64(step), list(shape), *place, dtype, device)


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
    y, eps_hat, seed, z, origin = _step_inputs("y_t", y_t, eps_hat, seed, z, origin)
    alpha, gamma = _alpha_gamma(alpha_t, gamma_t, y.device)
    step = _step(step, 1, y.device)
    if out is not None or into is not None:
        out = _outputs(y, {"y_t": y_t, "eps_hat": eps_hat, "z": z}, out, into)
        if not _watched(y, eps_hat, z, out, into):
            _refine_out(y, eps_hat, alpha, gamma, seed, step, z, *origin, out, into)
            return out
    args = (y, eps_hat, _float64(alpha), _float64(gamma), _int64(seed), _int64(step), z, *origin)
    if out is None:
        return torch.ops.sr3fast.refine(*args)
    _dispatch("refine_out", args, out, into)
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
    y, eps_hat, seed, z, origin = _step_inputs("y", y, eps_hat, seed, z, origin)
    if len(history) > 2:
        raise ValueError(f"history holds at most m_(t+1) and m_(t+2): got {len(history)} tensors")
    m1, m2 = [_like("history", m, y) for m in history] + [None] * (2 - len(history))
    if not isinstance(row, Tensor):
        if len(row) != 9:
            raise ValueError(f"a row is (recip, ratio, clip, A, B, C0, C1, C2, S), nine numbers: got {len(row)}")
        values = row
        if torch.compiler.is_compiling():
            row = torch.stack([_float64(v) for v in row]).float()
        else:
            row = torch.tensor(row, dtype=torch.float32)
    elif row.shape != (9,) or row.dtype != torch.float32:
        raise ValueError(f"a row tensor must be float32 [9]: got {row.dtype} {tuple(row.shape)}")
    else:
        _check_constant("row", row)
        row = row.detach().resolve_neg().contiguous()
        values = row.tolist() if len(history) < 2 and _readable(row) else ()
    if any(v != v for v in values):
        raise ValueError(f"a row holds numbers: got nan in {tuple(values)}")
    for name, coefficient, m in zip(("C1", "C2"), values[6:8], (m1, m2), strict=False):
        if coefficient != 0 and m is None:
            raise ValueError(f"the row has {name}={coefficient:g} but history holds {len(history)} tensors")
    _check_scalar_device("row", row, y.device)
    step = _step(step, 1, y.device)
    if out is None and into is None:
        return torch.ops.sr3fast.solver_step(y, eps_hat, row, _int64(seed), _int64(step), m1, m2, z, *origin)
    y_out, m_out = _two(out)
    inputs = {"y": given, "eps_hat": eps_hat, "z": z}
    y_out = _outputs(y, {**inputs, "m1": m1, "m2": m2}, y_out, into)
    if m_out is not None:
        # an element of m_{t+1}, m_{t+2} is read before the same element of m is written
        others = {**inputs, "m1": m1, "m2": m2, "out": y_out, "into": into}
        _check_out("m", m_out, y, others, may_be=("m1", "m2"))
    outs, rest = (y_out, m_out, into), (m1, m2, z, *origin)
    if _watched(y, eps_hat, m1, m2, z, *outs):
        _dispatch("solver_step_out", (y, eps_hat, row, _int64(seed), _int64(step), *rest), *outs)
    else:
        _solver_step_out(y, eps_hat, row, seed, step, *rest, *outs)
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
    _check_image("y_0", y_0, FLOATS)
    y = _dense(y_0)
    if eps is not None:
        if eps.dtype != y.dtype:
            raise TypeError(f"eps must have y_0's dtype: got {eps.dtype} and {y.dtype}")
        given_eps = eps
        eps = _like("eps", eps, y, FLOATS)
    elif seed is None:
        raise ValueError("q_sample needs a seed or eps: got neither")
    gamma = _gamma(gamma, y)
    seed, step = _seed(0 if seed is None else seed, y.shape[0], y.device), _step(step, 0, y.device)
    place = _origin(origin, y.shape)
    if out is None and into is None:
        y_t, drawn = torch.ops.sr3fast.q_sample(y, gamma, _int64(seed), _int64(step), eps, *place)
        return y_t, drawn if eps is None else given_eps
    y_out, eps_out = _two(out)
    y_out = _outputs(y, {"y_0": y_0, "eps": eps}, y_out, into)
    if eps is not None and eps_out is not None:
        raise ValueError("out has a place for eps, but eps was given")
    if eps_out is not None:
        _check_out("eps", eps_out, y, {"y_0": y_0, "out": y_out, "into": into})
    elif eps is None:
        eps_out = torch.empty_like(y)
    outs = (y_out, eps_out, into)
    if _watched(y, eps, *outs):
        _dispatch("q_sample_out", (y, gamma, _int64(seed), _int64(step), eps, *place), *outs)
    else:
        _q_sample_out(y, gamma, seed, step, eps, *place, *outs)
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
    first, second = _two(h, "h")
    _check_image("h", first, FLOATS)
    first = _dense(first)
    channels = first.shape[1]
    if second is not None:
        _check_image("h[1]", second, (first.dtype,))
        _check_device("h[1]", second, first.device)
        if second.shape[0] != first.shape[0] or second.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"a pair must agree but for the channels: got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        second = _dense(second, _layout(first))
        channels += second.shape[1]
    shift = _check_norm(first, channels, weight, bias, groups, eps, shift)
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
    _check_image("h", h, FLOATS)
    h = _dense(h)
    residual = _like("residual", residual, h, (h.dtype,))
    shift = _check_norm(h, h.shape[1], weight, bias, groups, eps, shift)
    out, s, _, _ = torch.ops.sr3fast.add_group_norm_silu(
        h, residual, weight.contiguous(), bias.contiguous(), groups, eps, shift, silu
    )
    return out, s


# ---------------------------------------------------------------------------------------------------------
# Checks: each states its rule and the values it met.


def _check_image(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor: got {type(t).__name__}")
    if t.ndim != 4:
        raise ValueError(f"{name} must be [B, C, H, W]: got {tuple(t.shape)}")
    if t.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {names}: got {str(t.dtype).removeprefix('torch.')}")


def _two(value, name: str = "out") -> tuple:
    """A tensor, or a pair of which the second may be None, as a pair."""
    if not isinstance(value, (tuple, list)):
        return value, None
    if len(value) != 2:
        raise ValueError(f"{name} must be a tensor or a pair: got {len(value)} of them")
    return tuple(value)


def _integer(name: str, value: int) -> int:
    if isinstance(value, int):
        return value
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int: got {type(value).__name__}")
    return int(value)


def _real(name: str, value: float) -> float:
    if isinstance(value, float):
        return value
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor: got {type(value).__name__}")
    return float(value)


def _check_constant(name: str, t: Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: there is no derivative to it (pass {name}.detach())")


def _check_channels(channels: int) -> None:
    if channels > 65536:
        raise ValueError(f"noise v1 numbers at most 65536 channels: got {channels}")


def _check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"all tensors must be on one device: got {name} on {t.device} and the rest on {device}")


def _check_scalar_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device.type != "cpu" and t.device != device:
        raise ValueError(f"{name} must be on the host or on {device}: got {t.device}")


def _layout(t: Tensor) -> torch.memory_format:
    if not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _dense(t: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    if layout is None:
        if t.is_contiguous():
            return t
        layout = _layout(t)
    return t.contiguous(memory_format=layout)


def _like(name: str, t: Tensor, y: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Tensor:
    """Check that t goes with y, and bring it to y's layout."""
    _check_image(name, t, dtypes)
    if t.shape != y.shape:
        raise ValueError(f"{name} must have the shape {tuple(y.shape)}: got {tuple(t.shape)}")
    _check_device(name, t, y.device)
    return _dense(t, _layout(y))


def _origin(origin: Origin, shape: Sequence[int]) -> Origin:
    if origin == (0, 0):
        return 0, 0
    h0, w0 = (_integer("origin", v) for v in origin)
    if not (0 <= h0 <= (1 << 32) - shape[2] and 0 <= w0 <= (1 << 32) - shape[3]):
        raise ValueError(
            f"origin must be in 0 .. 2^32 - 1, as must every pixel: got {(h0, w0)} for {shape[2]} x {shape[3]}"
        )
    return h0, w0


def _watched(*tensors: Tensor | None) -> bool:
    """Does the call need torch's dispatcher: for torch.compile, a tensor subclass, meta tensors, a negation that torch
    has put off? Else, for inference, it goes straight to the home, which saves a third of a small call."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    for t in tensors:  # noqa: SIM110 (twice as fast as any())
        if t is not None and (type(t) not in _PLAIN or t.is_meta or t.is_neg()):
            return True
    return False


_PLAIN = (Tensor, torch.nn.Parameter)


def _dispatch(op: str, inputs: Sequence, *outs: Tensor | None) -> None:
    """Through torch's dispatcher; negations are carried out before it, which knows none beside a None."""
    if not torch.compiler.is_compiling() and any(t.is_neg() for t in outs if t is not None):
        raise ValueError("out= and into= must not be views that negate (torch.Tensor.is_neg)")
    inputs = [t.resolve_neg() if isinstance(t, Tensor) else t for t in inputs]
    getattr(torch.ops.sr3fast, op)(*inputs, *outs)


def _written(*tensors: Tensor | None) -> None:
    """Tell autograd, as every in-place operation does: who saved one of them for a backward pass gets an error."""
    for t in tensors:
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _int64(value: int | Tensor) -> Tensor:
    """A number as the dispatcher takes it: a tensor on the host."""
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.int64)


def _float64(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():  # where the other would compile anew for every other float
        return torch.ones((), dtype=torch.float64) * value
    return torch.scalar_tensor(value, dtype=torch.float64)


def _seed(seed: Seed, batch: int, device: torch.device) -> int | Tensor:
    """The 64 bits as an int64: a number or tensor of which sample i uses seed + i, or a tensor [B]."""
    if isinstance(seed, (int, Integral)) and not isinstance(seed, bool):
        return noise_v1.signed64(int(seed))
    if isinstance(seed, Tensor) and seed.ndim == 0 and seed.dtype == torch.int64:
        _check_scalar_device("seed", seed, device)
        return seed
    return noise_v1.seeds(seed, batch, device).contiguous()


def _step(step: int | Tensor, least: int, device: torch.device) -> int | Tensor:
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise TypeError(f"a step tensor must hold one int64: got {step.dtype} {tuple(step.shape)}")
        _check_scalar_device("step", step, device)
        if _readable(step):
            _step(int(step), least, device)
        return step.view(())
    step = _integer("step", step)
    if not least <= step < 1 << 32:
        raise ValueError(f"step must be in {least} .. 2^32 - 1: got {step}")
    return step


def _readable(t: Tensor) -> bool:
    """Is its value at hand? A tensor on the GPU stays there, and one that is traced has no value yet."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _one_number(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """A float, or a float64 tensor of one element where the kernel is to read it."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number: got a tensor {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name} must be real: got {value.dtype}")
        _check_scalar_device(name, value, device)
        _check_constant(name, value)
        return value.detach().to(torch.float64).resolve_neg().view(())
    return _real(name, value)


def _alpha_gamma(
    alpha: float | Tensor, gamma: float | Tensor, device: torch.device
) -> tuple[float | Tensor, float | Tensor]:
    alpha, gamma = _one_number("alpha_t", alpha, device), _one_number("gamma_t", gamma, device)
    least = 0.0
    if not isinstance(gamma, Tensor) or _readable(gamma):
        least = float(gamma)
        if not 0 < least < 1:
            raise ValueError(f"gamma_t must be in (0, 1): got {least}")
    if not isinstance(alpha, Tensor) or _readable(alpha):
        value = float(alpha)
        if not (least <= value <= 1 and value > 0):
            raise ValueError(f"alpha_t must be in [gamma_t, 1] = [{least}, 1]: got {value}")
    if isinstance(alpha, Tensor) or isinstance(gamma, Tensor):  # the kernel reads both from one side
        alpha, gamma = _float64(alpha), _float64(gamma)
        if alpha.device != gamma.device:
            alpha, gamma = alpha.to(device), gamma.to(device)
    return alpha, gamma


def _gamma(gamma: float | Tensor, y: Tensor) -> Tensor:
    """float64, 0-dim or [B]."""
    if not isinstance(gamma, Tensor):
        gamma = _real("gamma", gamma)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1]: got {gamma}")
        return _float64(gamma)
    if not gamma.is_floating_point():
        raise TypeError(f"gamma must be floating point: got {gamma.dtype}")
    if gamma.numel() != 1 and gamma.shape != (y.shape[0],):
        raise ValueError(f"gamma must be one number or [B]: got {tuple(gamma.shape)} for a batch of {y.shape[0]}")
    _check_scalar_device("gamma", gamma, y.device)
    _check_constant("gamma", gamma)
    gamma = gamma.detach().double().resolve_neg()
    if _readable(gamma):
        low, high = (gamma.min().item(), gamma.max().item()) if gamma.numel() else (1.0, 1.0)
        if not (low > 0 and high <= 1):
            raise ValueError(f"gamma must be in (0, 1]: got values from {low} to {high}")
    if gamma.numel() == 1:
        return gamma.view(())
    return gamma.to(y.device).contiguous()


def _step_inputs(
    name: str, y: Tensor, eps_hat: Tensor, seed: Seed | None, z: Tensor | None, origin: Origin
) -> tuple[Tensor, Tensor, int | Tensor, Tensor | None, Origin]:
    _check_image(name, y, (torch.float32,))
    _check_channels(y.shape[1])
    _check_image("eps_hat", eps_hat, FLOATS)
    if eps_hat.shape != y.shape:
        raise ValueError(f"eps_hat must have {name}'s shape {tuple(y.shape)}: got {tuple(eps_hat.shape)}")
    _check_device("eps_hat", eps_hat, y.device)
    y = _dense(y)
    if z is not None:
        z = _like("z", z, y)
    elif seed is None:
        raise ValueError("a step needs a seed or z: got neither")
    seed = _seed(0 if seed is None else seed, y.shape[0], y.device)
    return y, eps_hat, seed, z, _origin(origin, y.shape)


def _outputs(y: Tensor, inputs: dict[str, Tensor | None], out: Tensor | None, into: Tensor | None) -> Tensor:
    """Check out= and into= against the inputs; out, made where it was not given, may be the first of them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs.values() if t is not None):
        raise ValueError("out= and into= are for inference: an input requires grad (use torch.no_grad())")
    if out is None:
        out = torch.empty_like(y)
    else:
        _check_out("out", out, y, inputs, may_be=(next(iter(inputs)),))
    if into is not None:
        _check_image("into", into, FLOATS)
        if into.shape != y.shape:
            raise ValueError(f"into must have the shape {tuple(y.shape)}: got {tuple(into.shape)}")
        _check_device("into", into, y.device)
        _check_writable("into", into)
        _check_apart("into", into, {**inputs, "out": out})
    return out


def _check_out(
    name: str, out: Tensor, y: Tensor, others: dict[str, Tensor | None], may_be: tuple[str, ...] = ()
) -> None:
    _check_image(name, out, (y.dtype,))
    if out.shape != y.shape:
        raise ValueError(f"{name} must have the shape {tuple(y.shape)}: got {tuple(out.shape)}")
    _check_device(name, out, y.device)
    if out.stride() != y.stride() and out.numel() > 0 and not out.is_contiguous(memory_format=_layout(y)):
        raise ValueError(f"{name} must have the input's layout, strides {y.stride()}: got {out.stride()}")
    _check_writable(name, out)
    _check_apart(name, out, others, may_be)


def _check_writable(name: str, t: Tensor) -> None:
    if t.requires_grad:
        raise ValueError(f"{name} must not require grad: out= and into= are for inference")
    if not t.is_contiguous() and _overlaps_itself(t):
        raise ValueError(f"{name} must not overlap itself in memory: got strides {t.stride()} for {tuple(t.shape)}")


def _overlaps_itself(t: Tensor) -> bool:
    reach = 0  # of the dimensions with smaller strides
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return True
            reach += (n - 1) * stride
    return False


def _check_apart(name: str, t: Tensor, others: dict[str, Tensor | None], may_be: tuple[str, ...] = ()) -> None:
    """t and the others share no memory; one named in may_be may also be t itself."""
    if torch.compiler.is_compiling() or t.is_meta or type(t) not in _PLAIN:  # no addresses there
        return
    low, high = _extent(t)
    for other_name, other in others.items():
        if other is None:
            continue
        other_low, other_high = _extent(other)
        if low >= other_high or other_low >= high or other.device != t.device or _interleaved(t, other):
            continue
        if not (other_name in may_be and other_low == low and other.stride() == t.stride()):
            raise ValueError(f"{name} must not overlap {other_name} in memory")


def _extent(t: Tensor) -> tuple[int, int]:
    if t.is_contiguous():
        low = t.data_ptr()
        return low, low + t.nbytes
    if t.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Two channel ranges of one buffer, as of a network's input: their extents cross, their elements do not."""
    if a.stride() != b.stride() or a.dtype != b.dtype or not a.shape[0] == b.shape[0] > 0:
        return False
    apart = abs(a.data_ptr() - b.data_ptr()) // a.element_size()
    channel = a.stride(1)
    if apart % channel != 0:
        return False
    between = apart // channel
    wider = min(s for s in (a.stride(0), a.stride(2), a.stride(3)) if s >= channel) if channel else 0
    return between >= max(a.shape[1], b.shape[1]) and (between + max(a.shape[1], b.shape[1])) * channel <= wider


def _check_norm(
    h: Tensor, channels: int, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None
) -> Tensor | None:
    groups = _integer("groups", groups)
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups must divide the channels: got {channels} channels and groups={groups}")
    if not (_real("eps", eps) >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must not be negative: got {eps}")
    for name, p, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (h.shape[0], channels)),
    ):
        if p is None and name == "shift":
            continue
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} must be a tensor: got {type(p).__name__}")
        if p.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}: got {tuple(p.shape)}")
        if p.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float16 or bfloat16: got {p.dtype}")
        _check_device(name, p, h.device)
    return None if shift is None else shift.contiguous()


# ---------------------------------------------------------------------------------------------------------
# Registration: schema, implementation, fake kernel, gradient.

_library = torch.library.Library("sr3fast", "DEF")

_STEP = "Tensor seed, Tensor step"
_PLACE = "SymInt h0, SymInt w0"
_NORM = "Tensor weight, Tensor bias, int groups, float eps, Tensor? shift, bool silu"
_library.define(f"noise({_STEP}, SymInt[] shape, int domain, {_PLACE}, ScalarType dtype, Device device) -> Tensor")
_refine = f"Tensor y_t, Tensor eps_hat, Tensor alpha_t, Tensor gamma_t, {_STEP}, Tensor? z, {_PLACE}"
_library.define(f"refine({_refine}) -> Tensor")
_library.define(f"refine_out({_refine}, Tensor(a!) out, Tensor(b!)? into) -> ()")
_solver_step = f"Tensor y, Tensor eps_hat, Tensor row, {_STEP}, Tensor? m1, Tensor? m2, Tensor? z, {_PLACE}"
_library.define(f"solver_step({_solver_step}) -> (Tensor, Tensor)")
_library.define(f"solver_step_out({_solver_step}, Tensor(a!) out, Tensor(b!)? m, Tensor(c!)? into) -> ()")
_q_sample = f"Tensor y_0, Tensor gamma, {_STEP}, Tensor? eps, {_PLACE}"
_library.define(f"q_sample({_q_sample}) -> (Tensor, Tensor)")
_library.define(f"q_sample_out({_q_sample}, Tensor(a!) out, Tensor(b!)? eps_out, Tensor(c!)? into) -> ()")
_library.define(f"group_norm_silu(Tensor h, Tensor? h2, {_NORM}) -> (Tensor, Tensor, Tensor)")
_library.define(f"add_group_norm_silu(Tensor h, Tensor residual, {_NORM}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "group_norm_silu_backward(Tensor grad, Tensor h, Tensor? h2, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor rstd, int groups, Tensor? shift, bool silu, Tensor? grad_s) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _implement(op: str):
    """Register the function as the op's kernel on every device."""

    def register(function):
        _library.impl(op, function, "CompositeExplicitAutograd")
        return function

    return register


def _fake(op: str):
    return torch.library.register_fake(f"sr3fast::{op}", lib=_library)


@_implement("noise")
def _noise(seed, step, shape, domain, h0, w0, dtype, device):
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel() > 0:
        backend.find("noise", out.device)((out,), seed, step, domain, (h0, w0))
    return out


@_fake("noise")
def _noise_fake(seed, step, shape, domain, h0, w0, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


@_implement("refine_out")
def _refine_out(y_t, eps_hat, alpha_t, gamma_t, seed, step, z, h0, w0, out, into):
    if y_t.numel() > 0:
        run = backend.find("refine", y_t.device)
        run((out, into), y_t, eps_hat, alpha_t, gamma_t, seed, step, z, (h0, w0))
        _written(out, into)


@_implement("refine")
def _refine_new(y_t, *args):
    out = torch.empty_like(y_t)
    _refine_out(y_t, *args, out, None)
    return out


@_implement("solver_step_out")
def _solver_step_out(y, eps_hat, row, seed, step, m1, m2, z, h0, w0, out, m, into):
    if y.numel() > 0:
        run = backend.find("solver_step", y.device)
        run((out, m, into), y, eps_hat, row, seed, step, m1, m2, z, (h0, w0))
        _written(out, m, into)


@_implement("solver_step")
def _solver_step_new(y, *args):
    out, m = torch.empty_like(y), torch.empty_like(y)
    _solver_step_out(y, *args, out, m, None)
    return out, m


@_implement("q_sample_out")
def _q_sample_out(y_0, gamma, seed, step, eps, h0, w0, out, eps_out, into):
    if y_0.numel() > 0:
        run = backend.find("q_sample", y_0.device)
        run((out, eps_out, into), y_0, gamma, seed, step, eps, (h0, w0))
        _written(out, eps_out, into)


@_implement("q_sample")
def _q_sample_new(y_0, gamma, seed, step, eps, h0, w0):
    out, eps_out = torch.empty_like(y_0), torch.empty_like(y_0) if eps is None else None
    _q_sample_out(y_0, gamma, seed, step, eps, h0, w0, out, eps_out, None)
    return out, y_0.new_empty(0) if eps_out is None else eps_out


@_fake("refine")
def _refine_fake(y_t, *args):
    return torch.empty_like(y_t)


@_fake("solver_step")
def _solver_step_fake(y, *args):
    return torch.empty_like(y), torch.empty_like(y)


@_fake("q_sample")
def _q_sample_fake(y_0, gamma, seed, step, eps, h0, w0):
    return torch.empty_like(y_0), torch.empty_like(y_0) if eps is None else y_0.new_empty(0)


for _op in ("refine_out", "solver_step_out", "q_sample_out"):
    _fake(_op)(lambda *args: None)


def _norm_outputs(h, h2, groups):
    channels = h.shape[1] + (0 if h2 is None else h2.shape[1])
    shape = (h.shape[0], channels, *h.shape[2:])
    out = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=_layout(h))
    mean = torch.empty((h.shape[0], groups), dtype=torch.float32, device=h.device)
    return out, mean, torch.empty_like(mean)


@_fake("group_norm_silu")
def _group_norm_silu_fake(h, h2, weight, bias, groups, eps, shift, silu):
    return _norm_outputs(h, h2, groups)


@_implement("group_norm_silu")
def _group_norm_silu(h, h2, weight, bias, groups, eps, shift, silu):
    out, mean, rstd = _norm_outputs(h, h2, groups)
    if out.numel() > 0:
        run = backend.find("group_norm_silu", h.device)
        run((out, mean, rstd), h, h2, weight, bias, groups, eps, shift, silu)
    return out, mean, rstd


@_fake("add_group_norm_silu")
def _add_group_norm_silu_fake(h, residual, weight, bias, groups, eps, shift, silu):
    out, mean, rstd = _norm_outputs(h, None, groups)
    return out, torch.empty_like(out), mean, rstd


@_implement("add_group_norm_silu")
def _add_group_norm_silu(h, residual, weight, bias, groups, eps, shift, silu):
    out, mean, rstd = _norm_outputs(h, None, groups)
    s = torch.empty_like(out)
    if out.numel() > 0:
        run = backend.find("add_group_norm_silu", h.device)
        run((out, s, mean, rstd), h, residual, weight, bias, groups, eps, shift, silu)
    return out, s, mean, rstd


@_fake("group_norm_silu_backward")
def _group_norm_silu_backward_outputs(grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s):
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=h.device)
    batch = 0 if shift is None else h.shape[0]
    dshift = torch.empty((batch, weight.shape[0]), dtype=torch.float32, device=h.device)
    dh2 = h.new_empty(0) if h2 is None else torch.empty_like(h2)
    return torch.empty_like(h), dh2, dweight, torch.empty_like(dweight), dshift


@_implement("group_norm_silu_backward")
def _group_norm_silu_backward(grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s):
    outs = _group_norm_silu_backward_outputs(grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s)
    dh, dh2, dweight, dbias, dshift = outs
    if dh.numel() == 0:
        return dh, dh2, dweight.zero_(), dbias.zero_(), dshift.zero_()
    run = backend.find("group_norm_silu_backward", h.device)
    run(
        (dh, None if h2 is None else dh2, dweight, dbias, None if shift is None else dshift),
        *(_dense(grad, _layout(h)), h, h2, weight, bias, mean, rstd, groups, shift, silu),
        None if grad_s is None else _dense(grad_s, _layout(h)),
    )
    return outs


def _save_refine(ctx, inputs, output):
    _, eps_hat, alpha, gamma, _, step, z, _, _ = inputs
    ctx.row = (alpha, gamma, step)
    ctx.eps_dtype, ctx.has_z = eps_hat.dtype, z is not None


def _refine_backward(ctx, grad):
    from .reference import refine_row

    alpha, gamma, step = ctx.row
    row = refine_row(alpha, gamma, step).to(grad.device)
    dz = grad * row[8] if ctx.has_z and ctx.needs_input_grad[6] else None
    return grad * row[3], (grad * row[4]).to(ctx.eps_dtype), None, None, None, None, dz, None, None


def _save_solver_step(ctx, inputs, output):
    y, eps_hat, row, _, _, m1, m2, z, _, _ = inputs
    ctx.save_for_backward(y, eps_hat, row)
    ctx.given = (m1 is not None, m2 is not None, z is not None)


def _solver_step_backward(ctx, grad_y, grad_m):
    y, eps_hat, row = ctx.saved_tensors
    recip, ratio, clip, a, b, c0, c1, c2, s = row.to(y.device).unbind()
    inside = (recip * y - ratio * eps_hat.float()).abs() <= clip
    dm = torch.where(inside, c0 * grad_y + grad_m, 0.0)
    dm1, dm2, dz = (k * grad_y if g else None for k, g in zip((c1, c2, s), ctx.given, strict=True))
    deps = (b * grad_y - ratio * dm).to(eps_hat.dtype)
    return a * grad_y + recip * dm, deps, None, None, None, dm1, dm2, dz, None, None


def _save_q_sample(ctx, inputs, output):
    ctx.gamma, ctx.has_eps = inputs[1], inputs[4] is not None


def _q_sample_backward(ctx, grad, grad_eps):
    gamma = ctx.gamma.to(grad.device).view(-1, 1, 1, 1)
    deps = grad * (1 - gamma).sqrt().to(grad.dtype) if ctx.has_eps else None
    return grad * gamma.sqrt().to(grad.dtype), None, None, None, deps, None, None


def _forced_again(ctx):
    """The home that was forced around the forward pass: autograd may call from a thread of its own."""
    return contextlib.nullcontext() if ctx.home is None else backend.use(ctx.home)


def _save_norm(ctx, inputs, output):
    ctx.home = backend.forced()
    h, h2, weight, bias, groups, _, shift, silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(h, h2, weight, bias, mean, rstd, shift)
    ctx.groups, ctx.silu = groups, silu


def _norm_backward(ctx, grad, grad_mean, grad_rstd):
    h, h2, weight, bias, mean, rstd, shift = ctx.saved_tensors
    with _forced_again(ctx):
        dh, dh2, dweight, dbias, dshift = torch.ops.sr3fast.group_norm_silu_backward(
            grad, h, h2, weight, bias, mean, rstd, ctx.groups, shift, ctx.silu, None
        )
    return (
        dh,
        None if h2 is None else dh2,
        *(dweight.to(weight.dtype), dbias.to(bias.dtype), None, None),
        *(None if shift is None else dshift.to(shift.dtype), None),
    )


def _save_add_norm(ctx, inputs, output):
    ctx.home = backend.forced()
    _, _, weight, bias, groups, _, shift, silu = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(s, weight, bias, mean, rstd)
    ctx.groups, ctx.silu, ctx.shift_dtype = groups, silu, None if shift is None else shift.dtype


def _add_norm_backward(ctx, grad, grad_s, grad_mean, grad_rstd):
    s, weight, bias, mean, rstd = ctx.saved_tensors
    with _forced_again(ctx):
        ds, _, dweight, dbias, _ = torch.ops.sr3fast.group_norm_silu_backward(
            grad, s, None, weight, bias, mean, rstd, ctx.groups, None, ctx.silu, grad_s
        )
    dshift = None if ctx.shift_dtype is None else ds.sum((2, 3), dtype=torch.float32).to(ctx.shift_dtype)
    return ds, ds, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, dshift, None


def _twice(ctx, *grads):
    raise RuntimeError("group_norm_silu has no second derivative: use F.silu(F.group_norm(...)) for that")


for _op, _backward, _save in (
    ("refine", _refine_backward, _save_refine),
    ("solver_step", _solver_step_backward, _save_solver_step),
    ("q_sample", _q_sample_backward, _save_q_sample),
    ("group_norm_silu", _norm_backward, _save_norm),
    ("add_group_norm_silu", _add_norm_backward, _save_add_norm),
    ("group_norm_silu_backward", _twice, None),
):
    torch.library.register_autograd(f"sr3fast::{_op}", _backward, setup_context=_save, lib=_library)
