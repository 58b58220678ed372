"""Noise v1: normals that depend on (seed, domain, step, channel, h, w) and on nothing else.

    z = noise(seed_i, domain, step)[c, h, w]

The same on every device, in any batch, layout, dtype, tile and rank. Philox4x32-10 (Salmon et al., SC 2011)
keyed with the sample's 64-bit seed, its counter made of the pixel's place, then Box-Muller in float32
operations that every machine rounds alike. This file states it in plain PyTorch; `csrc/common/noise.h` and
`kernels/noise.py` are the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

# What the draws are for; part of the counter.
Y_T, REFINE, TRAIN, LEVEL, AUGMENT = 0, 1, 2, 3, 4

# devices where the noise is drawn on the CPU and copied
WITHOUT_FLOAT64 = {"mps", "xpu"}

_MASK = 0xFFFFFFFF
_LOG_COEFFICIENTS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_HALF_PI_2_30 = 1.5707963267948966 * 2.0**-30  # PyTorch rounds it to float32 where it meets a float32 tensor


def signed64(value: int) -> int:
    """The int64 that holds the 64 bits of `value` mod 2^64."""
    if -(1 << 63) <= value <= (1 << 63) - 1:  # torch.compile's symbolic ints know no wider mask
        return value
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def seeds(
    seed: int | Sequence[int] | np.ndarray | Tensor, batch: int, device: torch.device | str | None = None
) -> Tensor:
    """One 64-bit seed a sample, int64 [B]: an int s gives s, s + 1, ..; B ints or a tensor [B] stand as they are.

    Raises:
        TypeError: a seed that is not an int, ints, or an int64 tensor.
        ValueError: their number is not the batch.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"a seed tensor must be int64 (holding the 64 bits): got {seed.dtype}")
        if seed.ndim == 0:
            return seed.to(device) + torch.arange(batch, device=seed.device if device is None else device)
        values = seed
    elif isinstance(seed, Integral) and not isinstance(seed, bool):
        values = torch.tensor([signed64(int(seed) + i) for i in range(batch)])
    elif isinstance(seed, Sequence | np.ndarray) and all(isinstance(s, Integral) for s in seed):
        values = torch.tensor([signed64(int(s)) for s in seed], dtype=torch.int64)
    else:
        raise TypeError(f"seed must be an int, a sequence of ints or an int64 tensor: got {seed!r}")
    if values.shape != (batch,):
        raise ValueError(f"there must be one seed a sample: got {tuple(values.shape)} seeds for a batch of {batch}")
    return values.to(device)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words for each counter, held in int64."""
    k0, k1 = key
    a0, a1, a2, a3 = counter
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, a0)
        hi1, lo1 = _multiply(0xCD9E8D57, a2)
        a0, a1, a2, a3 = hi1 ^ a1 ^ k0, lo1, hi0 ^ a3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return a0, a1, a2, a3


def _multiply(m: int, a: Tensor) -> tuple[Tensor, Tensor]:
    # int64 has no room for the unsigned 64-bit product: multiply the 16-bit halves of a
    low = (a & 0xFFFF) * m
    high = (a >> 16) * m + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(word: Tensor) -> Tensor:
    """((a >> 9) + 0.5) 2^-23: float32 in (0, 1), exact."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two 32-bit words: a gives the radius, b the angle. Every float32 operation rounds by itself."""
    u = uniform(a)
    i = u.view(torch.int32)
    e = (i - 0x3F3504F3) >> 23
    f = (i - (e << 23)).view(torch.float32) - 1.0
    e = e.float()
    s = f * f
    p = torch.full_like(f, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        p = p * f
        p = p + coefficient
    y = p * f
    y = y * s
    t = e * -2.12194440e-4
    y = y + t
    t = s * 0.5
    y = y - t
    t = e * 0.693359375
    y = f + y
    log_u = y + t
    # torch.sqrt of float32 is not correctly rounded on every CPU
    r = (log_u * -2.0).double().sqrt().float()

    q = (((b >> 29) + 1) >> 1) & 3
    v = (b - (q << 30)) & _MASK
    v = (v - ((v >> 31) << 32)).float() * _HALF_PI_2_30
    v2 = v * v
    sin = v2 * -1.9515295891e-4
    sin = sin + 8.3321608736e-3
    sin = sin * v2
    sin = sin - 1.6666654611e-1
    sin = sin * v2
    sin = sin * v
    sin = sin + v
    cos = v2 * 2.443315711809948e-5
    cos = cos - 1.388731625493765e-3
    cos = cos * v2
    cos = cos + 4.166664568298827e-2
    cos = cos * v2
    cos = cos * v2
    t = v2 * 0.5
    cos = cos - t
    cos = cos + 1.0
    odd = (q & 1) == 1
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    cos = torch.where((q == 1) | (q == 2), -cos, cos)
    sin = torch.where(q >= 2, -sin, sin)
    return r * cos, r * sin


def words(seed: Tensor, domain: int, step: Tensor | int, c: Tensor, h: Tensor, w4: Tensor) -> tuple[Tensor, ...]:
    """The four words of one counter; seed int64 [B, 1, 1, 1], the rest broadcast against it."""
    key = (seed & _MASK, (seed >> 32) & _MASK)
    shape = torch.broadcast_shapes(seed.shape, c.shape, h.shape, w4.shape)
    zero = torch.zeros(shape, dtype=torch.int64, device=seed.device)
    counter = (w4 + zero, h + zero, (zero + step) & _MASK, domain * 65536 + c + zero)
    return philox(key, counter)


def normals(
    seed: Tensor, shape: Sequence[int], domain: int, step: Tensor | int, origin: tuple[int, int] = (0, 0)
) -> Tensor:
    """Noise v1 of a whole tensor: seed int64 [B], shape [B, C, H, W]; float32 in NCHW."""
    if seed.device.type in WITHOUT_FLOAT64:
        step = step.cpu() if isinstance(step, Tensor) else step
        return _normals(seed.cpu(), shape, domain, step, origin).to(seed.device)
    return _normals(seed, shape, domain, step, origin)


def _normals(seed: Tensor, shape: Sequence[int], domain: int, step: Tensor | int, origin: tuple[int, int]) -> Tensor:
    _, channels, height, width = shape
    device = seed.device
    h0, w0 = origin
    first, last = w0 // 4, (w0 + width + 3) // 4
    c = torch.arange(channels, device=device).view(1, -1, 1, 1)
    h = torch.arange(h0, h0 + height, device=device).view(1, 1, -1, 1)
    w4 = torch.arange(first, last, device=device).view(1, 1, 1, -1)
    a0, a1, a2, a3 = words(seed.view(-1, 1, 1, 1), domain, step, c, h, w4)
    z = torch.stack(box_muller(a0, a1) + box_muller(a2, a3), dim=-1).flatten(-2)
    return z[..., w0 - 4 * first : w0 - 4 * first + width].contiguous()


def uniforms(seed: Tensor, domain: int, step: Tensor | int) -> tuple[Tensor, Tensor]:
    """Two uniforms a seed, from words a0 and a1 at (0, 0), c = 0: float32 [B] in (0, 1)."""
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    a0, a1, _, _ = words(seed, domain, step, zero, zero, zero)
    return uniform(a0), uniform(a1)
