"""The arguments of the ops: every rule, checked once, and brought to the form that the homes take.

Each error states its rule and the values it met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import noise as noise_v1

Origin = tuple[int, int]
Seed = int | Sequence[int] | Tensor
Pair = tuple[Tensor, Tensor]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (Tensor, torch.nn.Parameter)


def check_image(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: torch.Size | None = None) -> torch.Size:
    """t's shape, which must be `shape` if one is given."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor: got {type(t).__name__}")
    own = t.shape  # asked for once: it is made anew each time
    if len(own) != 4:
        raise ValueError(f"{name} must be [B, C, H, W]: got {tuple(own)}")
    if t.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {names}: got {str(t.dtype).removeprefix('torch.')}")
    if shape is not None and own != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}: got {tuple(own)}")
    check_tangent(name, t)
    return own


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def check_tangent(name: str, t: Tensor) -> None:
    """It would be lost without a word."""
    if in_forward_mode() and forward_ad.unpack_dual(t).tangent is not None:
        raise ValueError(
            f"{name} must not have a tangent: the ops differentiate in reverse mode only (sr3fast.reference in both)"
        )


def as_pair(value, name: str = "out") -> tuple:
    """A tensor, or a pair of which the second may be None, as a pair."""
    if not isinstance(value, (tuple, list)):
        return value, None
    if len(value) != 2:
        raise ValueError(f"{name} must be a tensor or a pair: got {len(value)} of them")
    return tuple(value)


def as_integer(name: str, value: int) -> int:
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


def check_constant(name: str, t: Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: there is no derivative to it (pass {name}.detach())")
    check_tangent(name, t)


def check_channels(channels: int) -> None:
    if channels > 65536:
        raise ValueError(f"noise v1 numbers at most 65536 channels: got {channels}")


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"all tensors must be on one device: got {name} on {t.device} and the rest on {device}")


def as_device(device: torch.device | str | None) -> torch.device:
    """The CPU where none is named; "cuda" is the current one, with its index, as tensors have it."""
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_scalar_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device.type != "cpu" and t.device != device:
        raise ValueError(f"{name} must be on the host or on {device}: got {t.device}")


def layout_of(t: Tensor) -> torch.memory_format:
    if not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def as_dense(t: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    if layout is None:
        if t.is_contiguous():
            return t
        layout = layout_of(t)
    return t.contiguous(memory_format=layout)


def as_like(name: str, t: Tensor, y: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Tensor:
    """Check that t goes with y, and bring it to y's layout."""
    check_image(name, t, dtypes, y.shape)
    check_device(name, t, y.device)
    return as_dense(t, layout_of(y))


def as_origin(origin: Origin, shape: Sequence[int]) -> Origin:
    if origin == (0, 0):
        return 0, 0
    h0, w0 = (as_integer("origin", v) for v in origin)
    if not (0 <= h0 <= (1 << 32) - shape[2] and 0 <= w0 <= (1 << 32) - shape[3]):
        raise ValueError(
            f"origin must be in 0 .. 2^32 - 1, as must every pixel: got {(h0, w0)} for {shape[2]} x {shape[3]}"
        )
    return h0, w0


def as_int64(value: int | Tensor) -> Tensor:
    """A number as the dispatcher takes it: a tensor on the host."""
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.int64)


def as_float64(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():  # where the other would compile anew for every other float
        return torch.ones((), dtype=torch.float64) * value
    return torch.scalar_tensor(value, dtype=torch.float64)


def as_seed(seed: Seed, batch: int, device: torch.device) -> int | Tensor:
    """The 64 bits as an int64: a number or tensor of which sample i uses seed + i, or a tensor [B]."""
    if type(seed) is int or (isinstance(seed, Integral) and not isinstance(seed, bool)):
        return noise_v1.signed64(int(seed))
    if isinstance(seed, Tensor) and seed.ndim == 0 and seed.dtype == torch.int64:
        check_scalar_device("seed", seed, device)
        return seed
    return noise_v1.seeds(seed, batch, device).contiguous()


def as_step(step: int | Tensor, least: int, device: torch.device) -> int | Tensor:
    if type(step) is int and least <= step < 1 << 32:
        return step
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise TypeError(f"a step tensor must hold one int64: got {step.dtype} {tuple(step.shape)}")
        check_scalar_device("step", step, device)
        if is_readable(step):
            as_step(int(step), least, device)
        return step.view(())
    step = as_integer("step", step)
    if not least <= step < 1 << 32:
        raise ValueError(f"step must be in {least} .. 2^32 - 1: got {step}")
    return step


def is_readable(t: Tensor) -> bool:
    """Is its value at hand? A tensor on the GPU stays there, and one that is traced has no value yet."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _one_number(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """A float, or a float64 tensor of one element where the kernel is to read it."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number: got a tensor {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name} must be real: got {value.dtype}")
        check_scalar_device(name, value, device)
        check_constant(name, value)
        return value.detach().to(torch.float64).resolve_neg().view(())
    return _real(name, value)


def as_alpha_gamma(
    alpha: float | Tensor, gamma: float | Tensor, device: torch.device
) -> tuple[float | Tensor, float | Tensor]:
    if type(alpha) is type(gamma) is float and 0 < gamma < 1 and gamma <= alpha <= 1:
        return alpha, gamma
    alpha, gamma = _one_number("alpha_t", alpha, device), _one_number("gamma_t", gamma, device)
    least = 0.0
    if not isinstance(gamma, Tensor) or is_readable(gamma):
        least = float(gamma)
        if not 0 < least < 1:
            raise ValueError(f"gamma_t must be in (0, 1): got {least}")
    if not isinstance(alpha, Tensor) or is_readable(alpha):
        value = float(alpha)
        if not (least <= value <= 1 and value > 0):
            raise ValueError(f"alpha_t must be in [gamma_t, 1] = [{least}, 1]: got {value}")
    if isinstance(alpha, Tensor) or isinstance(gamma, Tensor):  # the kernel reads both from one side
        alpha, gamma = as_float64(alpha), as_float64(gamma)
        if alpha.device != gamma.device:
            alpha, gamma = alpha.to(device), gamma.to(device)
    return alpha, gamma


def as_gamma(gamma: float | Tensor, y: Tensor) -> Tensor:
    """float64, 0-dim or [B]."""
    if not isinstance(gamma, Tensor):
        gamma = _real("gamma", gamma)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1]: got {gamma}")
        return as_float64(gamma)
    if not gamma.is_floating_point():
        raise TypeError(f"gamma must be floating point: got {gamma.dtype}")
    if gamma.numel() != 1 and gamma.shape != (y.shape[0],):
        raise ValueError(f"gamma must be one number or [B]: got {tuple(gamma.shape)} for a batch of {y.shape[0]}")
    check_scalar_device("gamma", gamma, y.device)
    check_constant("gamma", gamma)
    gamma, device = gamma.detach(), y.device
    if y.device.type in noise_v1.WITHOUT_FLOAT64:
        gamma, device = gamma.cpu(), torch.device("cpu")
    gamma = gamma.double().resolve_neg()
    if is_readable(gamma):
        low, high = (gamma.min().item(), gamma.max().item()) if gamma.numel() else (1.0, 1.0)
        if not (low > 0 and high <= 1):
            raise ValueError(f"gamma must be in (0, 1]: got values from {low} to {high}")
    if gamma.numel() == 1:
        return gamma.view(())
    return gamma.to(device).contiguous()


def step_inputs(
    name: str, y: Tensor, eps_hat: Tensor, seed: Seed | None, z: Tensor | None, origin: Origin, plain: bool = False
) -> tuple[Tensor, Tensor, int | Tensor, Tensor | None, Origin]:
    """With `plain`, `native.is_plain_step` has seen that y, eps_hat and out= keep every rule of theirs."""
    shape = y.shape if plain else check_image(name, y, (torch.float32,))
    check_channels(shape[1])
    device = y.device
    if not plain:
        check_image("eps_hat", eps_hat, FLOATS, shape)
        check_device("eps_hat", eps_hat, device)
        y = as_dense(y)
    if z is not None:
        z = as_like("z", z, y)
    elif seed is None:
        raise ValueError("a step needs a seed or z: got neither")
    seed = as_seed(0 if seed is None else seed, shape[0], device)
    return y, eps_hat, seed, z, as_origin(origin, shape)


def check_outputs(y: Tensor, inputs: dict[str, Tensor | None], out: Tensor | None, into: Tensor | None) -> Tensor:
    """Check out= and into= against the inputs; out, made where it was not given, may be the first of them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs.values() if t is not None):
        raise ValueError("out= and into= are for inference: an input requires grad (use torch.no_grad())")
    if out is None:
        out = torch.empty_like(y)
    else:
        check_out("out", out, y, inputs, may_be=(next(iter(inputs)),))
    if into is not None:
        check_image("into", into, FLOATS, y.shape)
        check_device("into", into, y.device)
        _check_writable("into", into)
        _check_apart("into", into, {**inputs, "out": out})
    return out


def check_out(
    name: str, out: Tensor, y: Tensor, others: dict[str, Tensor | None], may_be: tuple[str, ...] = ()
) -> None:
    check_image(name, out, (y.dtype,), y.shape)
    check_device(name, out, y.device)
    if out.stride() != y.stride() and out.numel() > 0 and not out.is_contiguous(memory_format=layout_of(y)):
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
    if torch.compiler.is_compiling() or t.is_meta or type(t) not in PLAIN:  # no addresses there
        return
    low, high = _extent(t)
    for other_name, other in others.items():
        if other is None:
            continue
        other_low, other_high = _extent(other)
        if low >= other_high or other_low >= high or other.device != t.device:
            continue
        if not (other_name in may_be and _same_memory(t, other)) and not _interleaved(t, other):
            raise ValueError(f"{name} must not overlap {other_name} in memory")


def _extent(t: Tensor) -> tuple[int, int]:
    if t.is_contiguous():
        low = t.data_ptr()
        return low, low + t.nbytes
    if t.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Element by element; the stride of a dimension of size 1 says nothing."""
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Two channel ranges of one buffer, as of a network's input: their extents cross, their elements do not."""
    if a.stride() != b.stride() or a.dtype != b.dtype or not a.shape[0] == b.shape[0] > 0:
        return False
    apart = abs(a.data_ptr() - b.data_ptr()) // a.element_size()
    channel = a.stride(1)
    if channel == 0 or apart % channel != 0:
        return False
    between = apart // channel
    wider = [a.stride(i) for i in (0, 2, 3) if a.shape[i] > 1 and a.stride(i) >= channel]
    most = max(a.shape[1], b.shape[1])
    return between >= most and all((between + most) * channel <= stride for stride in wider)


def check_norm(
    h: Tensor, channels: int, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None
) -> Tensor | None:
    groups = as_integer("groups", groups)
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
        check_device(name, p, h.device)
        check_tangent(name, p)
    return None if shift is None else shift.contiguous()
