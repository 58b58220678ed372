"""group_norm_silu and add_group_norm_silu in every home: against float64, as exact as plain torch."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, assert_as_exact_as_torch, random, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sr3fast import backend, ops

# (B, C, H, W, groups): odd sizes, few pixels, one group, a channel a group, channels that no vector divides.
# Small images come in larger batches: the largest of few errors is a lottery.
SHAPES = [
    (2, 32, 33, 31, 8),
    (9, 6, 5, 7, 3),
    (9, 7, 9, 3, 7),
    (3, 37, 6, 5, 1),
    (9, 64, 1, 1, 8),
    (1, 12, 70, 67, 4),
    (3, 130, 3, 2, 13),
]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def plain(h, weight, bias, groups, eps=1e-5, shift=None, silu=True):
    """What the docstring says it is equivalent to; parameters in h's dtype, as a network has them."""
    if isinstance(h, tuple):
        h = torch.cat(h, 1)
    if shift is not None:
        h = h + shift.to(h.dtype)[:, :, None, None]
    out = F.group_norm(h, groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    return F.silu(out) if silu else out


def plain_add(h, residual, weight, bias, groups, eps=1e-5, shift=None, silu=True):
    s = h if shift is None else h + shift.to(h.dtype)[:, :, None, None]
    s = s + residual
    return plain(s, weight, bias, groups, eps, None, silu), s


def data(shape, dtype, device, layout, mean=0.3, std=1.0, seed=0):
    b, c, h, w, _ = shape
    x = random(b, c, h, w, seed=seed, mean=mean, std=std, dtype=dtype, device=device, layout=layout)
    weight = random(c, seed=seed + 1, mean=1.0, std=0.3, dtype=dtype, device=device)
    bias = random(c, seed=seed + 2, std=0.5, dtype=dtype, device=device)
    shift = random(b, c, seed=seed + 3, std=0.7, dtype=dtype, device=device)
    return x, weight, bias, shift


def double(*tensors):
    return tuple(tuple(u.double() for u in t) if isinstance(t, tuple) else t.double() for t in tensors)


def split(h, first):
    """A pair whose concatenation is h, in h's layout."""
    layout = torch.contiguous_format if h.is_contiguous() else torch.channels_last
    return h[:, :first].contiguous(memory_format=layout), h[:, first:].contiguous(memory_format=layout)


# --------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(home, poisoned, shape, layout, dtype):
    groups = shape[-1]
    h, weight, bias, shift = data(shape, dtype, home, layout)
    for s in (None, shift):
        for silu in (True, False):
            out = ops.group_norm_silu(h, weight, bias, groups, 1e-3, shift=s, silu=silu)
            exact = plain(*double(h, weight, bias), groups, 1e-3, s, silu)
            assert_as_exact_as_torch(out, plain(h, weight, bias, groups, 1e-3, s, silu), exact)
            assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_forward(home, poisoned, shape, layout, dtype):
    groups = shape[-1]
    h, weight, bias, shift = data(shape, dtype, home, layout)
    residual = random(*h.shape, seed=9, mean=-0.1, dtype=dtype, device=home, layout=layout)
    for given_shift in (None, shift):
        for silu in (True, False):
            args = (weight, bias, groups, 1e-3)
            ours = ops.add_group_norm_silu(h, residual, *args, shift=given_shift, silu=silu)
            simple = plain_add(h, residual, *args, given_shift, silu)
            exact = plain_add(*double(h, residual, weight, bias), groups, 1e-3, given_shift, silu)
            for name, *three in zip(("out", "s"), ours, simple, exact, strict=True):
                assert_as_exact_as_torch(*three, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("first", [1, 5, 8, 12])
def test_pairs(home, poisoned, first, layout, dtype):
    """A pair is its concatenation, also where a group of 4 channels straddles the seam (1 and 5)."""
    shape = (2, 16, 9, 11, 4)
    h, weight, bias, shift = data(shape, dtype, home, layout)
    for s in (None, shift):
        out = ops.group_norm_silu(split(h, first), weight, bias, 4, shift=s)
        exact = plain(*double(h, weight, bias), 4, shift=s)
        assert_as_exact_as_torch(out, plain(h, weight, bias, 4, shift=s), exact)


def test_a_pair_may_mix_layouts(home):
    h, weight, bias, _ = data((2, 16, 9, 11, 4), torch.float32, home, torch.contiguous_format)
    first, second = split(h, 5)
    expected = ops.group_norm_silu((first, second), weight, bias, 4)
    second = second.to(memory_format=torch.channels_last)
    assert same_bits(ops.group_norm_silu((first, second), weight, bias, 4), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 33, 31, 8), (1, 6, 70, 67, 2)], ids=str)
def test_mean_a_hundred_times_the_deviation(home, poisoned, shape, layout, dtype):
    """E[h^2] - E[h]^2 would lose the variance here."""
    h, weight, bias, shift = data(shape, dtype, home, layout, mean=100.0, std=1.0)
    for s in (None, shift):
        out = ops.group_norm_silu(h, weight, bias, shape[-1], shift=s)
        exact = plain(*double(h, weight, bias), shape[-1], shift=s)
        assert_as_exact_as_torch(out, plain(h, weight, bias, shape[-1], shift=s), exact)


def test_a_shift_a_hundred_times_the_deviation(home, poisoned):
    h, weight, bias, shift = data((2, 8, 33, 31, 4), torch.float32, home, torch.contiguous_format)
    shift = 100 + shift
    out = ops.group_norm_silu(h, weight, bias, 4, shift=shift)
    exact = plain(*double(h, weight, bias), 4, shift=shift)
    assert_as_exact_as_torch(out, plain(h, weight, bias, 4, shift=shift), exact)


def test_constant_input(home):
    """No variance: eps alone is under the root."""
    h = torch.full((2, 4, 5, 7), 3.25, device=home)
    weight, bias = torch.ones(4, device=home), torch.tensor([0.0, 1.0, -1.0, 2.0], device=home)
    out = ops.group_norm_silu(h, weight, bias, 2, silu=False)
    assert same_bits(out, bias.view(1, -1, 1, 1).expand_as(out).contiguous())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_of_another_dtype(home, layout):
    """float32 parameters with a bfloat16 h, as a mixed-precision network has them."""
    h, weight, bias, shift = data((2, 32, 9, 11, 8), torch.float32, home, layout)
    h = h.bfloat16()
    out = ops.group_norm_silu(h, weight, bias, 8, shift=shift)
    exact = plain(*double(h, weight, bias), 8, shift=shift.double())
    assert_as_exact_as_torch(out, plain(h, weight, bias, 8, shift=shift), exact)


def test_non_contiguous_inputs(home):
    h, weight, bias, shift = data((2, 8, 9, 11, 4), torch.float32, home, torch.contiguous_format)
    expected = ops.group_norm_silu(h, weight, bias, 4, shift=shift)
    wide = torch.zeros(2, 8, 9, 22, device=home)[..., ::2].copy_(h)
    weight_2, bias_2 = (torch.zeros(16, device=home)[::2].copy_(p) for p in (weight, bias))
    shift_t = torch.zeros(8, 2, device=home).t().copy_(shift)
    assert same_bits(ops.group_norm_silu(wide, weight_2, bias_2, 4, shift=shift_t), expected)
    sliced = torch.zeros(2, 12, 9, 11, device=home)[:, 2:10].copy_(h)
    assert same_bits(ops.group_norm_silu(sliced, weight, bias, 4, shift=shift), expected)


def test_extreme_values(home):
    """silu at both ends: no overflow in its exponential, no 0 * inf."""
    h = torch.linspace(-1, 1, 2 * 64, device=home).view(1, 2, 8, 8)
    for scale in (50.0, 300.0, 1e30):
        weight, bias = torch.full((2,), scale, device=home), torch.zeros(2, device=home)
        out = ops.group_norm_silu(h, weight, bias, 1)
        exact = plain(*double(h, weight, bias), 1)
        assert_as_exact_as_torch(out, plain(h, weight, bias, 1), exact)


def test_not_a_number_spoils_only_its_group(home):
    h, weight, bias, _ = data((2, 8, 5, 7, 4), torch.float32, home, torch.contiguous_format)
    h[1, 3, 2, 2] = float("nan")
    bad = ops.group_norm_silu(h, weight, bias, 4).isnan().flatten(2).any(-1)
    assert bad.tolist() == [[False] * 8, [False, False, True, True, False, False, False, False]]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 9),
    width=st.integers(1, 9),
    size=st.tuples(st.integers(1, 20), st.integers(2, 20)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seam=st.integers(0, 80),
    shifted=st.booleans(),
    silu=st.booleans(),
)
def test_any_shape(home, batch, groups, width, size, dtype, layout, seam, shifted, silu):
    channels = groups * width
    seam %= channels
    results = []
    draws = 3 + 4000 // (batch * channels * math.prod(size))  # the largest error of a few elements is a lottery
    for seed in range(0, 100 * draws, 100):
        h, weight, bias, shift = data((batch, channels, *size, groups), dtype, home, layout, seed=seed)
        shift = shift if shifted else None
        pair = split(h, seam) if seam else h
        # eps above the variance that rounding makes in a group of two
        out = ops.group_norm_silu(pair, weight, bias, groups, 0.1, shift=shift, silu=silu)
        exact = plain(*double(h, weight, bias), groups, 0.1, shift, silu)
        results.append((out, plain(h, weight, bias, groups, 0.1, shift, silu), exact))
    assert_as_exact_as_torch(*(torch.stack(three) for three in zip(*results, strict=True)))


# -------------------------------------------------------------------------------------------------- backward


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(f, tensors, *upstream):
    outs = f(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = sum((o * g.to(o.dtype)).sum() for o, g in zip(outs, upstream, strict=True))
    return torch.autograd.grad(loss, tensors)


def compare(ours, simple, names, draw):
    """Three draws taken together: the largest of a few errors, as of dweight's, is a lottery."""
    results = []
    for seed in (0, 100, 200):
        tensors, upstream = draw(seed)
        results.append(
            [
                gradients(ours, leaves(*tensors), *upstream),
                gradients(simple, leaves(*tensors), *upstream),
                gradients(simple, leaves(*double(*tensors)), *upstream),
            ]
        )
    for i, name in enumerate(names):
        assert_as_exact_as_torch(
            *(torch.stack([grads[i] for grads in three]) for three in zip(*results, strict=True)), name
        )


NAMES = ("h", "weight", "bias", "shift")


def upstreams(n, shape, dtype, device, layout, seed):
    options = {"mean": 0.1, "dtype": dtype, "device": device, "layout": layout}
    return [random(*shape[:4], seed=seed + 11 + i, **options) for i in range(n)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(home, poisoned, shape, layout, dtype):
    groups = shape[-1]

    def draw(seed, shifted=True):
        tensors = data(shape, dtype, home, layout, seed=seed)
        return tensors if shifted else tensors[:3], upstreams(1, shape, dtype, home, layout, seed)

    for silu in (True, False):
        compare(
            lambda h, w, b, s, silu=silu: ops.group_norm_silu(h, w, b, groups, 1e-3, shift=s, silu=silu),
            lambda h, w, b, s, silu=silu: plain(h, w, b, groups, 1e-3, s, silu),
            *(NAMES, draw),
        )
        compare(
            lambda h, w, b, silu=silu: ops.group_norm_silu(h, w, b, groups, 1e-3, silu=silu),
            lambda h, w, b, silu=silu: plain(h, w, b, groups, 1e-3, None, silu),
            *(NAMES[:3], functools.partial(draw, shifted=False)),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_add_backward(home, poisoned, shape, layout, dtype):
    groups = shape[-1]

    def draw(seed):
        h, *rest = data(shape, dtype, home, layout, seed=seed)
        residual, *upstream = upstreams(3, shape, dtype, home, layout, seed)
        return (h, residual, *rest), upstream

    compare(
        lambda h, r, w, b, s: ops.add_group_norm_silu(h, r, w, b, groups, 1e-3, shift=s),
        lambda h, r, w, b, s: plain_add(h, r, w, b, groups, 1e-3, s),
        *(("h", "residual", *NAMES[1:]), draw),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("first", [1, 5, 8])
def test_pair_backward(home, poisoned, first, layout, dtype):
    shape = (2, 16, 9, 11, 4)

    def draw(seed):
        h, *rest = data(shape, dtype, home, layout, seed=seed)
        return (*split(h, first), *rest), upstreams(1, shape, dtype, home, layout, seed)

    compare(
        lambda h, h2, w, b, s: ops.group_norm_silu((h, h2), w, b, 4, shift=s),
        lambda h, h2, w, b, s: plain((h, h2), w, b, 4, shift=s),
        *(("h", "h2", *NAMES[1:]), draw),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_backward_with_a_large_mean(home, layout):
    shape = (2, 32, 33, 31, 8)

    def draw(seed):
        tensors = data(shape, torch.float32, home, layout, mean=100.0, seed=seed)
        return tensors, upstreams(1, shape, torch.float32, home, layout, seed)

    compare(
        lambda h, w, b, s: ops.group_norm_silu(h, w, b, 8, shift=s),
        lambda h, w, b, s: plain(h, w, b, 8, shift=s),
        *(NAMES, draw),
    )


def test_upstream_of_another_layout(home):
    """A gradient that arrives expanded, or in the other layout."""
    h, weight, bias, _ = data((2, 8, 9, 11, 4), torch.float32, home, torch.contiguous_format)
    (leaf,) = leaves(h)
    out = ops.group_norm_silu(leaf, weight, bias, 4)
    (expected,) = torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones(1, 1, 1, 1, device=home).expand_as(out), retain_graph=True)
    assert same_bits(grad, expected)
    upstream = random(*h.shape, seed=3, device=home)
    (expected,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True)
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(memory_format=torch.channels_last))
    assert same_bits(grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_deterministic(home, layout):
    """Twice the same call, twice the same bits, forward and backward."""
    tensors = data((3, 32, 33, 31, 8), torch.float32, home, layout)
    upstream = random(3, 32, 33, 31, seed=12, device=home, layout=layout)

    def run():
        inputs = leaves(*tensors)
        out = ops.group_norm_silu(*inputs[:3], 8, shift=inputs[3])
        return out, *torch.autograd.grad(out, inputs, upstream)

    assert all(map(same_bits, run(), run()))


@pytest.mark.skipif(isinstance(backend.load("cpp"), str), reason="no compiled module")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_threads(threads, layout):
    """One thread or two: as exact, and the same bits where a thread has whole groups (NCHW)."""
    shape = (2, 32, 65, 67, 8)

    def draw(seed):
        tensors = data(shape, torch.float32, "cpu", layout, seed=seed)
        return tensors, upstreams(1, shape, torch.float32, "cpu", layout, seed)

    tensors, upstream = draw(0)
    results = []
    for n in (1, 2):
        threads(n)
        inputs = leaves(*tensors)
        out = ops.group_norm_silu(*inputs[:3], 8, shift=inputs[3])
        results.append((out, *torch.autograd.grad(out, inputs, *upstream)))
        compare(
            lambda h, w, b, s: ops.group_norm_silu(h, w, b, 8, shift=s),
            lambda h, w, b, s: plain(h, w, b, 8, shift=s),
            *(NAMES, draw),
        )
    if layout == torch.contiguous_format:
        assert all(map(same_bits, *results))


# ----------------------------------------------------------------------------------------------------- empty


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_empty(home, shape):
    h = torch.zeros(shape, device=home, requires_grad=True)
    weight, bias = (torch.ones(4, device=home, requires_grad=True) for _ in range(2))
    shift = torch.ones(shape[0], 4, device=home, requires_grad=True)
    out = ops.group_norm_silu(h, weight, bias, 2, shift=shift)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), (h, weight, bias, shift))
    assert all((g == 0).all() for g in grads) and grads[0].shape == shape
    out, s = ops.add_group_norm_silu(h, h, weight, bias, 2, shift=shift)
    assert out.shape == s.shape == shape
