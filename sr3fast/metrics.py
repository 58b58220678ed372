"""What the field measures of a super-resolved picture, a number a sample.

Pictures are [B, C, H, W] of floats in [-1, 1]; psnr and ssim round them to 8 bits first, as published numbers do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .image import quantize, resize

SSIM_SIDE = 11  # pixels of its window


def _check_float(*pictures: torch.Tensor) -> None:
    for y in pictures:
        if not y.is_floating_point():
            raise TypeError(f"pictures are compared as floats in [-1, 1]: got {y.dtype} (x / 127.5 - 1 of uint8)")


def _pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_float(a, b)
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"two batches of one shape [B, C, H, W] are compared: got {list(a.shape)} and {list(b.shape)}")
    return a.detach(), b.detach()


def psnr(y: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """10 log10(255^2 / MSE), in decibels, over the whole picture, float64 [B]; inf where equal."""
    a, b = _pair(y, truth)
    error = (quantize(a).double() - quantize(b).double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(y: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), float64 [B], at most 1.

    11 x 11 Gaussian window of sigma 1.5 where it lies inside the picture (so sides of at least 11),
    K = 0.01 and 0.03 of 255, population moments, mean over the channels.
    """
    a, b = _pair(y, truth)
    if min(a.shape[-2:]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs sides of at least {SSIM_SIDE} pixels: got {a.shape[-2]} x {a.shape[-1]}")
    a, b = quantize(a).double(), quantize(b).double()
    place = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(a.shape[1], 1, -1)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(values, window[..., None], groups=values.shape[1])
        return F.conv2d(rows, window[:, :, None], groups=values.shape[1])

    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a * mean_a
    variance_b = local_mean(b * b) - mean_b * mean_b
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    return similarity.mean((1, 2, 3))


def consistency(y: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """MSE between down(y) and the source [B, C, h, w], on [0, 1] as in the paper's tables, float64 [B].

    down is Pillow's bicubic; no rounding.
    """
    _check_float(y, source)
    if y.ndim != 4 or y.shape[:2] != source.shape[:2]:
        raise ValueError(f"batch and channels of y and source differ: {list(y.shape)} and {list(source.shape)}")
    down = resize(y.detach().float(), (source.shape[-2], source.shape[-1]))
    return ((down.double() - source.detach().double()) / 2).square().mean((1, 2, 3))


def spectrum(y: torch.Tensor, bins: int = 32) -> torch.Tensor:
    """Power by spatial frequency, float64 [B, bins], from 0 to 1/2 cycle a pixel in rings of equal width.

    Of a Hann-windowed picture with its mean removed, averaged over the channels and the ring.
    """
    _check_float(y)
    if y.ndim != 4:
        raise ValueError(f"a batch [B, C, H, W] is needed: got {list(y.shape)}")
    values = y.detach().double()
    height, width = values.shape[-2:]
    if min(height, width) < 2 * bins:
        raise ValueError(f"{bins} bins need sides of at least {2 * bins} pixels: got {height} x {width}")
    rows = torch.hann_window(height, dtype=torch.float64, device=y.device)
    columns = torch.hann_window(width, dtype=torch.float64, device=y.device)
    window = rows[:, None] * columns
    window = window / window.square().mean().sqrt()
    values = (values - values.mean((2, 3), keepdim=True)) * window
    power = torch.fft.fft2(values, norm="ortho").abs().square().mean(1)
    f_h = torch.fft.fftfreq(height, dtype=torch.float64, device=y.device)
    f_w = torch.fft.fftfreq(width, dtype=torch.float64, device=y.device)
    ring = (torch.hypot(f_h[:, None], f_w) * 2 * bins).floor().long().flatten()
    inside = ring < bins
    total = power.new_zeros(len(power), bins).index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return total / torch.bincount(ring[inside], minlength=bins)


def spectral_distance(y: torch.Tensor, truth: torch.Tensor, bins: int = 32) -> torch.Tensor:
    """How far the power at each frequency lies from the truth's, in decibels, float64 [B].

    The root mean square over the rings of 10 log10((P_y + f) / (P_truth + f)); the floor f = (2/255)^2 / 12
    is the noise of 8-bit rounding. Blurred pictures lose power, noisy ones gain it; PSNR rewards the first.
    """
    a, b = _pair(y, truth)
    rounding = (2 / 255) ** 2 / 12
    ratio = 10 * torch.log10((spectrum(a, bins) + rounding) / (spectrum(b, bins) + rounding))
    return ratio.square().mean(1).sqrt()
