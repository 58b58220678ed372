"""The metrics against scikit-image's and on pictures with a known answer."""

import math

import numpy as np
import pytest
import torch
from skimage import metrics as skimage_metrics

from sr3fast import image, metrics


def pictures(height=40, width=33):
    generator = torch.Generator().manual_seed(0)
    truth = image.resize(torch.randn(2, 3, 12, 10, generator=generator) * 0.5, (height, width)).clamp(-1, 1)
    noise = torch.tensor([0.02, 0.2]).reshape(2, 1, 1, 1) * torch.randn(truth.shape, generator=generator)
    return truth + noise, truth


def uint8(batch):
    return [np.asarray(image.to_picture(values)) for values in batch]


def test_psnr_is_that_of_scikit_image_on_8_bits():
    y, truth = pictures()
    expected = [skimage_metrics.peak_signal_noise_ratio(b, a) for a, b in zip(uint8(y), uint8(truth), strict=True)]
    assert metrics.psnr(y, truth).tolist() == pytest.approx(expected, rel=1e-12)


def test_psnr_of_one_level_everywhere_and_of_equal_pictures():
    truth = torch.full((1, 3, 4, 4), 0.2)  # level 153
    assert metrics.psnr(truth + 2 / 255, truth).item() == pytest.approx(20 * math.log10(255), rel=1e-12)
    assert metrics.psnr(truth, truth).item() == math.inf


def test_ssim_is_that_of_scikit_image_with_the_borders_cut():
    y, truth = pictures()
    expected = []
    for a, b in zip(uint8(y), uint8(truth), strict=True):
        _, full = skimage_metrics.structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
            truncate=3.5,
        )
        expected.append(full[5:-5, 5:-5].mean())
    assert metrics.ssim(y, truth).tolist() == pytest.approx(expected, rel=1e-9)
    assert metrics.ssim(truth, truth).tolist() == pytest.approx([1, 1], rel=1e-12)


def test_consistency_is_zero_for_bicubic_of_a_constant_and_known_for_an_offset():
    source = torch.full((2, 3, 5, 6), 0.25)
    y = image.resize(source, (20, 24))
    y[1] += 0.5
    zero, offset = metrics.consistency(y, source).tolist()
    assert zero < 1e-12
    assert offset == pytest.approx(0.25**2, rel=1e-5)  # 0.5 on [-1, 1] is 0.25 on [0, 1]


def test_spectrum_of_white_noise_is_its_variance_and_of_a_wave_lies_at_its_frequency():
    noise = 0.3 * torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    assert metrics.spectrum(noise, 16)[:, 2:].mean().item() == pytest.approx(0.09, rel=0.02)
    wave = torch.cos(2 * math.pi * 0.33 * torch.arange(128)).expand(1, 1, 128, 128)
    assert metrics.spectrum(wave, 10).argmax().item() == 6  # 0.33 cycles a pixel: the ring from 0.3 to 0.35


def test_spectral_distance_tells_blur_from_truth():
    truth = 0.3 * torch.randn(1, 3, 96, 80, generator=torch.Generator().manual_seed(2))
    blurred = image.resize(image.resize(truth, (48, 40)), (96, 80))
    assert metrics.spectral_distance(truth, truth).item() == 0
    louder = metrics.spectral_distance(truth * 0.5, truth).item()
    assert louder == pytest.approx(20 * math.log10(2), rel=1e-2)
    assert metrics.spectral_distance(blurred, truth).item() > 2 * louder


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"got \[1, 3, 4, 4\] and \[1, 3, 4, 5\]"):
        metrics.psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="at least 11 pixels: got 4 x 4"):
        metrics.ssim(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="32 bins need sides of at least 64"):
        metrics.spectrum(torch.zeros(1, 3, 40, 80))
    with pytest.raises(ValueError, match="differ"):
        metrics.consistency(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 2, 2))


def test_pictures_of_integers_are_refused():
    y = torch.randint(0, 256, (1, 3, 64, 64)).byte()
    for measure in (metrics.psnr, metrics.ssim, metrics.consistency, metrics.spectral_distance):
        with pytest.raises(TypeError, match=r"floats in \[-1, 1\]: got torch.uint8"):
            measure(y, y)
    with pytest.raises(TypeError, match="floats"):
        metrics.spectrum(y)
