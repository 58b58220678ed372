"""The engine's 3x3 convolution on a CPU: against float64, as exact as plain torch in the same layout."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_exact_as_torch, nan_like, random, same_bits

from sr3fast import backend
from sr3fast.engine.winograd import Scratch, Winograd

HOME = backend.load("cpp")
pytestmark = pytest.mark.skipif(isinstance(HOME, str), reason="the C++ kernels are not built")

# (B, C, N, H, W): tiles cut off on each side, channels that no vector divides, several panels, few tiles, many
SHAPES = [
    (2, 37, 33, 5, 9),
    (3, 50, 40, 33, 31),
    (1, 600, 70, 8, 8),
    (1, 64, 32, 64, 128),
    (2, 48, 64, 7, 90),
    (2, 32, 32, 128, 64),
]
THIN = [(3, 3, 3, 64, 1), (1, 3, 5, 1, 64), (40, 16, 16, 1, 1), (2, 6, 64, 3, 3)]  # with results of few products


def data(shape, mean=0.3):
    B, C, N, H, W = shape
    h = random(B, C, H, W, mean=mean, layout=torch.channels_last)
    weight = random(N, C, 3, 3, seed=1, std=(9 * C) ** -0.5)
    onto = random(B, N, H, W, seed=3, layout=torch.channels_last)
    return h, weight, random(N, seed=2), onto


def layer(weight, bias=None):
    return Winograd(HOME, HOME.conv3x3_pack(weight), len(weight), bias, Scratch())


def plain(h, weight, bias, onto):
    return F.conv2d(h, weight, bias, padding=1) + onto


def rms(t):
    return t.double().square().mean().sqrt().item()


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_convolution(shape, count, threads):
    threads(count)
    h, weight, bias, onto = data(shape)
    conv = layer(weight, bias)
    expected = plain(h, weight, bias, onto)
    exact = plain(h.double(), weight.double(), bias.double(), onto.double())
    out = conv(h, onto)
    assert rms(out - exact) <= 2 * rms(expected - exact)
    if HOME.fast_conv3x3():  # the largest error too, where the engine takes it
        assert_as_exact_as_torch(out, expected, exact)
    assert out.is_contiguous(memory_format=torch.channels_last) and not same_bits(out, onto)
    owned = onto.clone(memory_format=torch.preserve_format)
    assert conv(h, owned, owned=True).data_ptr() == owned.data_ptr() and same_bits(owned, out)
    bare = layer(weight)(h) + bias[:, None, None] + onto
    assert rms(bare - exact) <= 2 * rms(expected - exact)


@pytest.mark.parametrize("shape", THIN, ids=str)
def test_thin_pictures(shape):
    h, weight, bias, onto = data(shape)
    error = layer(weight, bias)(h, onto) - plain(h.double(), weight.double(), bias.double(), onto.double())
    assert error.abs().max() < 2**-21 * F.conv2d(h.abs(), weight.abs(), padding=1).max()


@pytest.mark.parametrize("shape", SHAPES + THIN, ids=str)
def test_what_was_in_memory_does_not_matter(shape):
    h, weight, _, _ = data(shape)
    packed, out = HOME.conv3x3_pack(weight), nan_like(F.conv2d(h, weight, padding=1))
    scratch = functools.cache(lambda floats: torch.full((floats,), float("nan")))
    HOME.conv3x3(out, h, packed, None, None, scratch)
    again = nan_like(out)
    HOME.conv3x3(again, h, packed, None, None, scratch)  # with what the first left there
    assert out.isfinite().all() and same_bits(out, again)
    assert same_bits(out, layer(weight)(h.contiguous()))  # of any layout


def test_a_tile_knows_nothing_of_the_others(threads):
    """Pictures beside it, infinite ones too, and the number of threads change no bit."""
    threads(1)
    h, weight, bias, onto = data((3, 64, 48, 30, 26))
    conv = layer(weight, bias)
    alone = conv(h[1:2], onto[1:2])
    h[0], h[2] = float("inf"), float("nan")
    assert same_bits(conv(h, onto)[1:2], alone)
    threads(5)
    assert same_bits(conv(h, onto)[1:2], alone)


def test_one_scratch_serves_all_layers():
    scratch = Scratch()
    for shape in (SHAPES[0], SHAPES[2], SHAPES[1], SHAPES[0]):
        h, weight, bias, onto = data(shape)
        conv = Winograd(HOME, HOME.conv3x3_pack(weight), len(weight), bias, scratch)
        assert same_bits(conv(h, onto), layer(weight, bias)(h, onto))
