"""Noise v1: the known answers, the same bits in every home, what it may not depend on, its statistics."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bits, same_bits
from scipy import special, stats

from sr3fast import backend, ops
from sr3fast import noise as noise_v1

KNOWN = json.loads((Path(__file__).parent / "data" / "noise_v1_kat.json").read_text())


def floats(words):
    return torch.tensor([int(w, 16) for w in words]).to(torch.int32).view(torch.float32)


def home_name():
    return backend._forced.get()


@functools.cache
def specified(shape, seeds, domain, step, origin):
    return noise_v1.normals(noise_v1.seeds(seeds, shape[0]), shape, domain, step, origin)


def ints(words):
    return torch.tensor([int(w, 16) for w in words])


# ---------------------------------------------------------------------------------------- known answers


def test_known_words():
    for known in KNOWN["at"]:
        c, h, w4 = (torch.tensor(known[k]) for k in ("c", "h", "w4"))
        seed = noise_v1.seeds([known["seed"]], 1)
        words = noise_v1.words(seed, known["domain"], known["step"], c, h, w4)
        assert torch.cat(words).tolist() == ints(known["words"]).tolist()


def test_known_normals_of_words():
    for known in [*KNOWN["box_muller"], *KNOWN["at"]]:
        words = ints(known["words"])
        normals = torch.stack(noise_v1.box_muller(words[0::2], words[1::2]), -1).flatten()
        assert same_bits(normals, floats(known["normals"])), known


def test_known_normals(home):
    for known in KNOWN["at"]:
        if known["c"] > 1000 and home_name() == "torch":
            continue  # slow there, and its words are checked above
        origin = (known["h"], 4 * known["w4"])
        z = ops.noise(
            (1, known["c"] + 1, 1, 4), known["seed"], domain=known["domain"], step=known["step"],
            origin=origin, device=home,
        )  # fmt: skip
        assert same_bits(z[0, -1, 0], floats(known["normals"])), known


def test_known_images(home, poisoned):
    for known in KNOWN["images"]:
        z = ops.noise(
            (1, *known["shape"]), known["seed"], domain=known["domain"], step=known["step"],
            origin=known["origin"], device=home,
        )  # fmt: skip
        assert same_bits(z.flatten(), floats(known["normals"]))


# Where the smallest and the largest radius are drawn, and the ends of the four quadrants.
def test_extreme_words():
    ends = [0, 511, 512, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 1, *(k << 29 for k in range(8))]
    ends += [(k << 29) - 1 for k in range(1, 8)]
    a, b = (t.flatten() for t in torch.meshgrid(torch.tensor(ends), torch.tensor(ends), indexing="ij"))
    first, second = noise_v1.box_muller(a, b)
    u = (torch.div(a, 512, rounding_mode="floor").double() + 0.5) / 2**23
    radius, angle = (-2 * u.log()).sqrt(), b.double() * (math.pi / 2**31)
    assert torch.isfinite(first).all() and torch.isfinite(second).all()
    assert (first - radius * angle.cos()).abs().max() < 2e-6
    assert (second - radius * angle.sin()).abs().max() < 2e-6


# --------------------------------------------------------------------------- the same bits in every home


@pytest.mark.parametrize("shape", [(3, 6, 33, 31), (2, 2, 1, 5), (1, 70, 3, 9)])
@pytest.mark.parametrize("origin", [(0, 0), (5, 3), (129, 4098)])
def test_homes_agree(home, poisoned, shape, origin):
    z = ops.noise(shape, 77, step=12, origin=origin, device=home)
    assert same_bits(z, specified(shape, 77, 1, 12, origin))


def test_homes_agree_at_512(home):
    shape = (1, 3, 512, 512)
    assert same_bits(ops.noise(shape, 77, step=12, device=home), specified(shape, 77, 1, 12, (0, 0)))


def test_homes_agree_over_a_million(home):
    shape, seeds = (4, 3, 300, 301), (2**64 - 1, 0, 2**63, 12345678901234567890)
    z = ops.noise(shape, seeds, domain=2, step=2**32 - 1, origin=(0, 1), device=home)
    assert z.numel() > 10**6 and same_bits(z, specified(shape, seeds, 2, 2**32 - 1, (0, 1)))


# (seed, h, w) where the smallest and the largest u of all are drawn
@pytest.mark.parametrize(
    ("seed", "h", "w", "radius"),
    [
        (23, 365, 1982, 5.768107),
        (36, 1216, 1742, 5.768107),
        (1, 2005, 1556, 3.452669e-4),
        (3, 999, 1256, 3.452669e-4),
    ],
)
def test_extreme_radii(home, seed, h, w, radius):
    origin = (h, w // 4 * 4)
    z = ops.noise((1, 1, 1, 4), seed, device=home, origin=origin)
    assert same_bits(z, specified((1, 1, 1, 4), seed, 1, 0, origin))
    assert z[0, 0, 0, w % 4 : w % 4 + 2].norm().item() == pytest.approx(radius, rel=1e-6)


# ------------------------------------------------------------------------------- what it may not depend on


def test_batch_and_seeds(home):
    z = ops.noise((3, 2, 5, 6), 2**64 - 2, device=home)
    for i, seed in enumerate([2**64 - 2, 2**64 - 1, 0]):
        assert same_bits(z[i : i + 1], ops.noise((1, 2, 5, 6), seed, device=home))
    assert same_bits(z, ops.noise((3, 2, 5, 6), [2**64 - 2, 2**64 - 1, 0], device=home))
    assert same_bits(z, ops.noise((3, 2, 5, 6), -2, device=home))
    assert same_bits(z, ops.noise((3, 2, 5, 6), torch.tensor([-2, -1, 0]), device=home))
    assert same_bits(z, ops.noise((3, 2, 5, 6), torch.tensor(-2), device=home))


@pytest.mark.parametrize("origin", [(0, 0), (1, 1), (7, 2), (3, 7), (16, 20)])
def test_tile(home, origin):
    whole = ops.noise((2, 3, 40, 41), 5, step=3, device=home)
    (h, w), (height, width) = origin, (11, 13)
    tile = ops.noise((2, 3, height, width), 5, step=3, origin=origin, device=home)
    assert same_bits(tile, whole[:, :, h : h + height, w : w + width])


def test_channels(home):
    assert same_bits(ops.noise((1, 9, 4, 5), 5, device=home)[:, :4], ops.noise((1, 4, 4, 5), 5, device=home))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(home, poisoned, dtype):
    z = ops.noise((2, 3, 17, 33), 5, device=home)
    assert same_bits(ops.noise((2, 3, 17, 33), 5, device=home, dtype=dtype), z.to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout(home, layout):
    """The noise inside refine is the one of ops.noise, whatever y's layout."""
    y = torch.zeros(2, 3, 9, 11, device=home).to(memory_format=layout)
    z = ops.noise(y.shape, 5, step=4, device=home)
    out = ops.refine(y, y, 0.75, 0.5, 5, 4)
    assert out.is_contiguous(memory_format=layout) and same_bits(out, 0.5 * z)


def test_threads(threads):
    """Once with one thread, once with two: the same bits."""
    shape = (2, 3, 130, 131)
    results = []
    for n in (1, 2):
        threads(n)
        results.append(ops.noise(shape, 5, step=4))
    assert same_bits(*results)


def test_step_tensor(home):
    step = torch.tensor(9, device=home)
    assert same_bits(
        ops.noise((1, 2, 3, 4), 5, step=step, device=home), ops.noise((1, 2, 3, 4), 5, step=9, device=home)
    )


def test_devices_without_float64_get_the_bits_of_the_cpu(monkeypatch):
    """As far as a CPU can tell."""
    y, gamma = torch.zeros(2, 3, 5, 6), torch.tensor([0.25, 0.5], dtype=torch.float64)
    arguments = (y.shape, 3), {"step": torch.tensor(4), "origin": (1, 2)}
    with backend.use("torch"):
        expected = ops.noise(*arguments[0], **arguments[1]), *ops.q_sample(y, gamma, 5, 6)
        monkeypatch.setattr(noise_v1, "WITHOUT_FLOAT64", {"cpu"})
        assert all(map(same_bits, (ops.noise(*arguments[0], **arguments[1]), *ops.q_sample(y, gamma, 5, 6)), expected))


def test_everything_in_the_counter_counts(home):
    def z(seed=1, **options):
        return ops.noise((1, 2, 8, 8), seed, device=home, **options)

    others = [z(2), z(1 + 2**32), z(step=1), z(domain=0), z(domain=2), z(origin=(8, 0)), z(origin=(0, 8))]
    draws = torch.cat([z(), *others]).flatten(1)
    assert bits(draws).unique().numel() == draws.numel()
    correlation = np.corrcoef(draws.cpu().double().numpy())
    assert np.abs(correlation - np.eye(8)).max() < 5 / math.sqrt(128)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(home, shape):
    assert ops.noise(shape, 1, device=home).shape == shape


# ---------------------------------------------------------------------------------------------- statistics


def test_uniforms():
    u, v = noise_v1.uniforms(noise_v1.seeds(0, 200_000), noise_v1.LEVEL, 3)
    for x in (u, v):
        assert x.min() > 0 and x.max() < 1 and x.dtype == torch.float32
        assert stats.kstest(x.double().numpy(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u, v)[0, 1]) < 5 / math.sqrt(200_000)
    words = torch.tensor([0, 511, 512, 2**32 - 1])
    assert noise_v1.uniform(words).tolist() == [2**-24, 2**-24, 3 * 2**-24, 1 - 2**-24]


@pytest.fixture(scope="module")
def many():
    """10^7 normals, [10, 4, 500, 500], as float64."""
    return ops.noise((10, 4, 500, 500), 2026, step=7).double()


def test_moments(many):
    n = many.numel()
    second = many.square()
    mean, variance = many.mean().item(), second.mean().item()
    skew, kurtosis = (second * many).mean().item(), second.square().mean().item()
    # five standard errors of each moment of n normals
    assert n == 10**7 and abs(mean) < 5 / math.sqrt(n)
    assert abs(variance - 1) < 5 * math.sqrt(2 / n)
    assert abs(skew) < 5 * math.sqrt(15 / n)
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / n)


def test_tails(many):
    n = many.numel()
    for threshold in (2.0, 3.0, 4.0, 4.5):
        for tail in (many > threshold, many < -threshold):
            expected = n * special.ndtr(-threshold)
            assert abs(tail.sum().item() - expected) < 5 * math.sqrt(expected)
    assert many.abs().max() <= math.sqrt(-2 * math.log(2**-24)) + 1e-6


def test_kolmogorov_smirnov(many):
    z = np.sort(many.flatten().numpy())
    uniform = special.ndtr(z)
    place = np.arange(len(z) + 1) / len(z)
    distance = max((place[1:] - uniform).max(), (uniform - place[:-1]).max())
    assert stats.kstwobign.sf(distance * math.sqrt(len(z))) > 1e-4


def test_neighbours_are_independent(many):
    pairs = {
        "w": (many[..., :-1], many[..., 1:]),
        "w2": (many[..., :-2], many[..., 2:]),
        "w4": (many[..., :-4], many[..., 4:]),
        "h": (many[..., :-1, :], many[..., 1:, :]),
        "c": (many[:, :-1], many[:, 1:]),
        "b": (many[:-1], many[1:]),
    }
    for name, (a, b) in pairs.items():
        n = a.numel()
        assert abs((a * b).mean().item()) < 5 / math.sqrt(n), name
        # of the squares too: Box-Muller's pairs share a radius
        assert abs(((a * a - 1) * (b * b - 1)).mean().item()) < 5 * 2 / math.sqrt(n), name
