"""refine, solver_step and q_sample: the same bits in every home, float64, gradients, layouts."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import DTYPES, LAYOUTS, assert_as_exact_as_torch, nan_like, random, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sr3fast import backend, ops
from sr3fast import noise as noise_v1
from sr3fast.reference import refine_row
from sr3fast.schedule import Schedule

# odd sizes, one channel, more channels than a vector or a tile holds, rows shorter than four pixels, whole vectors
SHAPES = [
    (3, 6, 33, 31),
    (2, 1, 5, 7),
    (2, 3, 1, 3),
    (1, 17, 4, 19),
    (2, 70, 3, 18),
    (1, 3, 2, 300),
    (2, 4, 1, 1),
    (2, 3, 9, 64),
    (1, 2, 5, 192),
    (1, 2, 2, 1088),
]
ROWS = {
    "everything": (1.75, 0.6, 1.0, 0.9, -0.3, 0.25, -0.15, 0.05, 0.4),
    "no clip": (1.75, 0.6, math.inf, 0.9, -0.3, 0.25, -0.15, 0.05, 0.4),
    "ddpm": (1.75, 0.6, 1.0, 0.3, 0.0, 0.7, 0.0, 0.0, 0.1),
    "dpm++2m": (1.75, 0.6, 1.0, 0.3, 0.0, 0.7, -0.2, 0.0, 0.0),
    "sr3": (1.0, 0.0, math.inf, 1.01, -0.02, 0.0, 0.0, 0.0, 0.1),
    "last": (1.75, 0.6, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
}


def row_of(y, f, row, m1, m2, z):
    """y', m in NumPy's float32, which rounds operation by operation."""
    y, f, m1, m2, z = (None if t is None else t.detach().float().cpu().numpy() for t in (y, f, m1, m2, z))
    recip, ratio, clip, a, b, c0, c1, c2, s = (np.float32(v) for v in row)
    m = np.clip(recip * y - ratio * f, -clip, clip)
    out = a * y + b * f
    for c, term in ((c0, m), (c1, m1), (c2, m2), (s, z)):
        if c != 0:
            out = out + c * term
    return torch.from_numpy(np.ascontiguousarray(out)), torch.from_numpy(np.ascontiguousarray(m))


def inputs(shape, device, layout=torch.contiguous_format, dtype=torch.float32):
    y = random(*shape, seed=1, device=device, layout=layout)
    eps_hat = random(*shape, seed=2, device=device, layout=layout, dtype=dtype)
    history = [random(*shape, seed=i, std=0.5, device=device, layout=layout) for i in (3, 4)]
    return y, eps_hat, history


def strided(t, how):
    """The same values with other strides."""
    if how == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if how == "channels of a buffer":
        buffer = nan_like(torch.cat([t, t], 1).to(memory_format=torch.channels_last))
        view = buffer[:, 1 : 1 + t.shape[1]]
    elif how == "every second pixel":
        view = nan_like(t.repeat_interleave(2, 3))[..., ::2]
    elif how == "transposed":
        view = nan_like(t.transpose(2, 3).contiguous()).transpose(2, 3)
    else:
        return t.contiguous()
    return view.copy_(t)


STRIDES = ["contiguous", "channels_last", "channels of a buffer", "every second pixel", "transposed"]


# rows that end inside a vector, and rows of whole vectors: one, several, an odd number, more than a tile holds
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from((32, 64, 96, 128, 192, 1088)))


# -------------------------------------------------------------------------------- the row, bit for bit


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solver_step(home, poisoned, shape, layout):
    y, eps_hat, history = inputs(shape, home, layout)
    z = noise_v1.normals(noise_v1.seeds(2**64 - 1, shape[0]), shape, noise_v1.REFINE, 9, (3, 5))
    for name, row in ROWS.items():
        out, m = ops.solver_step(y, eps_hat, row, 2**64 - 1, 9, history=history, origin=(3, 5))
        expected, expected_m = row_of(y, eps_hat, row, *history, z)
        assert same_bits(out, expected), name
        assert same_bits(m, expected_m), name
        assert out.stride() == m.stride() == y.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eps_hat_and_into(home, poisoned, dtype, how, layout):
    """eps_hat and into of every dtype and layout; what lies between into's elements stays."""
    for shape in ((2, 3, 9, 37), (2, 20, 3, 6)):
        y, eps_hat, history = inputs(shape, home, layout, dtype)
        eps_hat = strided(eps_hat, how)
        into = strided(torch.zeros(shape, dtype=dtype, device=home), how)
        base = into if into._base is None else into._base
        untouched = base.isnan().sum()
        z = noise_v1.normals(noise_v1.seeds(3, shape[0]), shape, noise_v1.REFINE, 2)
        out, m = nan_like(y), nan_like(y)
        row = ROWS["everything"]
        assert ops.solver_step(y, eps_hat, row, 3, 2, history=history, out=(out, m), into=into)[0] is out
        expected, expected_m = row_of(y, eps_hat, row, *history, z)
        assert same_bits(out, expected) and same_bits(m, expected_m)
        assert same_bits(into, expected.to(dtype)) and base.isnan().sum() == untouched


def equal_numbers(a, b):
    """The same bits, but for the payload of a NaN."""
    return same_bits(*(t.nan_to_num(7.0, math.inf, -math.inf) for t in (a, b))) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("how", ["contiguous", "every second pixel"])
def test_every_number_of_16_bits(home, dtype, how):
    """Read as eps_hat; and written as into: each of them, what lies just beside it, and halfway to the next."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 256, 256).to(home)
    zeros = torch.zeros(every.shape, device=home)
    read, _ = ops.solver_step(zeros, strided(every, how), (0, 0, math.inf, 0, 1, 0, 0, 0, 0), 0, 1)
    assert equal_numbers(read, every.float() + 0)
    nearest = every.float().view(torch.int32)
    halfway = nearest + ((every.view(torch.int16) + 1).view(dtype).float().view(torch.int32) - nearest) // 2
    for words in (nearest, halfway):
        for y in (words - 1, words, words + 1):
            y = y.view(torch.float32)
            into = strided(torch.zeros_like(every), how)
            ops.solver_step(y, zeros, (0, 0, math.inf, 1, 0, 0, 0, 0, 0), 0, 1, into=into)
            assert equal_numbers(into, (y + 0).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_million_elements(home, layout):
    y, eps_hat, _ = inputs((4, 3, 300, 301), home, layout)
    z = million_z()
    out = ops.refine(y, eps_hat, 0.999, 0.4, 11, 1999)
    row = refine_row(*(torch.tensor(v, dtype=torch.float64) for v in (0.999, 0.4)), torch.tensor(1999)).tolist()
    assert y.numel() > 10**6 and same_bits(out, row_of(y, eps_hat, row, None, None, z)[0])


_million = []


def million_z():
    if not _million:
        _million.append(noise_v1.normals(noise_v1.seeds(11, 4), (4, 3, 300, 301), noise_v1.REFINE, 1999))
    return _million[0]


@pytest.mark.parametrize("name", ROWS)
def test_history_may_be_overwritten(home, name):
    """m may be stored where m_{t+2} lies, y' where y lies."""
    y, eps_hat, history = inputs((2, 3, 9, 37), home)
    expected, expected_m = ops.solver_step(y, eps_hat, ROWS[name], 3, 2, history=history)
    out, m = ops.solver_step(y, eps_hat, ROWS[name], 3, 2, history=history, out=(y, history[1]))
    assert out is y and m is history[1] and same_bits(y, expected) and same_bits(m, expected_m)


def test_m_is_not_stored_where_nobody_asks(home, poisoned):
    y, eps_hat, history = inputs((2, 3, 9, 37), home)
    expected, _ = ops.solver_step(y, eps_hat, ROWS["everything"], 3, 2, history=history)
    out, m = ops.solver_step(y, eps_hat, ROWS["everything"], 3, 2, history=history, out=nan_like(y))
    assert same_bits(out, expected) and m.numel() == 0


def test_row_tensor_and_step_tensor(home):
    y, eps_hat, history = inputs((2, 3, 9, 37), home)
    expected, _ = ops.solver_step(y, eps_hat, ROWS["everything"], 3, 2, history=history)
    row = torch.tensor(ROWS["everything"])
    for device in {torch.device("cpu"), home}:
        step, seed = torch.tensor(2, device=device), torch.tensor(3, device=device)
        out, _ = ops.solver_step(y, eps_hat, row.to(device), seed, step, history=history)
        assert same_bits(out, expected)


def test_not_a_number_stays(home):
    y, eps_hat, history = inputs((1, 1, 2, 40), home)
    y[0, 0, 0, 3], eps_hat[0, 0, 1, 30] = math.nan, math.inf
    out, m = ops.solver_step(y, eps_hat, ROWS["everything"], 3, 2, history=history)
    assert m[0, 0, 0, 3].isnan() and m[0, 0, 1, 30] == -1 and out.isnan().sum() == 1


# ---------------------------------------------------------------------------------------------- refine


def plain_refine(y, f, alpha, gamma, z):
    """The paper's formula, as one writes it."""
    return (y - (1 - alpha) / math.sqrt(1 - gamma) * f) / math.sqrt(alpha) + math.sqrt(1 - alpha) * z


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 2, 50, 1000, 2000])
def test_refine_against_float64(home, poisoned, t, dtype):
    schedule = Schedule.named("linear", T=2000)
    alpha, gamma = schedule.alpha[t].item(), schedule.gamma[t].item()
    y, eps_hat, _ = inputs((3, 6, 33, 31), home, dtype=dtype)
    z = torch.zeros_like(y) if t == 1 else ops.noise(y.shape, 7, step=t, device=home)
    exact = plain_refine(y.double(), eps_hat.double(), alpha, gamma, z.double())
    plain = plain_refine(y, eps_hat.float(), alpha, gamma, z)
    assert_as_exact_as_torch(ops.refine(y, eps_hat, alpha, gamma, 7, t), plain, exact)
    assert_as_exact_as_torch(ops.refine(y, eps_hat, alpha, gamma, None, t, z=z), plain, exact)


def test_refine_is_a_row(home):
    """refine is a row of solver_step, bit for bit, from host values and from tensors."""
    y, eps_hat, _ = inputs((2, 3, 9, 37), home)
    for step in (1, 5):
        alpha, gamma = (torch.tensor(v, dtype=torch.float64) for v in (0.97, 0.3))
        row = refine_row(alpha, gamma, torch.tensor(step))
        expected, _ = ops.solver_step(y, eps_hat, row, 3, step)
        assert same_bits(ops.refine(y, eps_hat, 0.97, 0.3, 3, step), expected)
        tensors = (
            alpha.to(home),
            gamma.to(home),
            torch.tensor([3, 4], device=home),
            torch.tensor(step, device=home),
        )
        assert same_bits(ops.refine(y, eps_hat, *tensors), expected)


def test_refine_adds_no_noise_at_step_1(home):
    y, eps_hat, _ = inputs((2, 3, 9, 37), home)
    z = random(2, 3, 9, 37, seed=8, device=home)
    plain = ops.refine(y, eps_hat, 0.9, 0.5, 3, 1)
    assert same_bits(plain, ops.refine(y, eps_hat, 0.9, 0.5, None, 1, z=z))
    assert same_bits(plain, ops.refine(y, eps_hat, 0.9, 0.5, 4, 1))
    assert not torch.equal(plain, ops.refine(y, eps_hat, 0.9, 0.5, 3, 2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_refine_in_place(home, layout):
    y, eps_hat, _ = inputs((2, 3, 9, 37), home, layout)
    expected = ops.refine(y, eps_hat, 0.9, 0.5, 3, 4)
    assert ops.refine(y, eps_hat, 0.9, 0.5, 3, 4, out=y) is y and same_bits(y, expected)


def test_tiles(home):
    """A tile refined with its origin is the tile of the refined image."""
    y, eps_hat, _ = inputs((2, 3, 40, 41), home)
    whole = ops.refine(y, eps_hat, 0.9, 0.5, 3, 4)
    for h, w in ((0, 0), (7, 9), (12, 16)):
        place = (slice(None), slice(None), slice(h, h + 21), slice(w, w + 22))
        assert same_bits(ops.refine(y[place], eps_hat[place], 0.9, 0.5, 3, 4, origin=(h, w)), whole[place])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), WIDTHS),
    y_how=st.sampled_from(STRIDES),
    f_how=st.sampled_from(STRIDES),
    into_how=st.sampled_from(STRIDES),
    dtype=st.sampled_from(DTYPES),
    row=st.sampled_from(sorted(ROWS)),
    origin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_any_shape_and_strides(home, shape, y_how, f_how, into_how, dtype, row, origin):
    y, eps_hat, history = inputs(shape, home, dtype=dtype)
    z = noise_v1.normals(noise_v1.seeds(5, shape[0]), shape, noise_v1.REFINE, 3, origin)
    expected, expected_m = row_of(y, eps_hat, ROWS[row], *history, z)
    y, eps_hat = strided(y, y_how), strided(eps_hat, f_how)
    out, m = ops.solver_step(y, eps_hat, ROWS[row], 5, 3, history=history, origin=origin)
    assert same_bits(out, expected) and same_bits(m, expected_m)
    into = strided(torch.zeros_like(eps_hat), into_how)
    out, m = ops.solver_step(y, eps_hat, ROWS[row], 5, 3, history=history, origin=origin, into=into)
    assert same_bits(out, expected) and same_bits(into, expected.to(dtype))


# -------------------------------------------------------------------------------------------- q_sample


def plain_q_sample(y_0, gamma, eps):
    gamma = gamma.view(-1, 1, 1, 1)
    return gamma.sqrt().to(y_0.dtype) * y_0 + (1 - gamma).sqrt().to(y_0.dtype) * eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_sample(home, poisoned, shape, layout, dtype):
    y_0 = random(*shape, seed=1, std=0.5, device=home, dtype=dtype, layout=layout)
    gamma = torch.linspace(1e-4, 1.0, shape[0], dtype=torch.float64, device=home)
    drawn = noise_v1.normals(noise_v1.seeds(5, shape[0]), shape, noise_v1.TRAIN, 1234, (2, 3)).to(home)
    y_t, eps = ops.q_sample(y_0, gamma, 5, 1234, origin=(2, 3))
    assert same_bits(eps, drawn.to(dtype)) and y_t.stride() == eps.stride() == y_0.stride()
    exact = plain_q_sample(y_0.double(), gamma, drawn.double())
    assert_as_exact_as_torch(y_t, plain_q_sample(y_0, gamma, drawn.to(dtype)), exact)
    # the same bits in every home
    signal, share = (t.float().view(-1, 1, 1, 1).cpu() for t in (gamma.sqrt(), (1 - gamma).sqrt()))
    assert same_bits(y_t, (signal * y_0.cpu().float() + share * drawn.cpu()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", STRIDES)
def test_q_sample_out_and_into(home, how, dtype):
    for shape, layout in itertools.product(((2, 3, 9, 37), (2, 20, 3, 6)), LAYOUTS):
        y_0 = random(*shape, seed=1, device=home, layout=layout)
        expected, expected_eps = ops.q_sample(y_0, 0.3, 5, 6)
        into = strided(torch.zeros(shape, dtype=dtype, device=home), how)
        out, eps = nan_like(y_0), nan_like(y_0)
        assert ops.q_sample(y_0, 0.3, 5, 6, out=(out, eps), into=into)[0] is out
        assert same_bits(out, expected) and same_bits(eps, expected_eps) and same_bits(into, expected.to(dtype))
        assert same_bits(ops.q_sample(strided(y_0, how), 0.3, 5, 6)[0], expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), WIDTHS),
    y_how=st.sampled_from(STRIDES),
    into_how=st.sampled_from(STRIDES),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    a_sample=st.booleans(),
    origin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_q_sample_and_noise_of_any_shape_and_strides(home, shape, y_how, into_how, dtypes, a_sample, origin):
    y_0 = strided(random(*shape, seed=1, dtype=dtypes[0], device=home), y_how)
    drawn = noise_v1.normals(noise_v1.seeds(5, shape[0]), shape, noise_v1.TRAIN, 3, origin)
    gamma = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64) if a_sample else torch.tensor(0.3).double()
    signal, share = (t.float().view(-1, 1, 1, 1) for t in (gamma.sqrt(), (1 - gamma).sqrt()))
    expected = signal * y_0.cpu().float() + share * drawn
    into = strided(torch.zeros(shape, dtype=dtypes[1], device=home), into_how)
    y_t, eps = ops.q_sample(y_0, gamma.to(home) if a_sample else gamma.item(), 5, 3, origin=origin, into=into)
    assert same_bits(y_t, expected.to(dtypes[0])) and same_bits(eps, drawn.to(dtypes[0]))
    assert same_bits(into, expected.to(dtypes[1]))
    z = ops.noise(shape, 5, domain=noise_v1.TRAIN, step=3, origin=origin, device=home, dtype=dtypes[1])
    assert same_bits(z, drawn.to(dtypes[1]))


def test_q_sample_gamma(home):
    """One number, a tensor of one, or one a sample."""
    y_0 = random(2, 3, 5, 7, seed=1, device=home)
    expected = ops.q_sample(y_0, 0.25, 5)
    for gamma in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25]).to(home)):
        y_t, eps = ops.q_sample(y_0, gamma, 5)
        assert same_bits(y_t, expected[0]) and same_bits(eps, expected[1])


def test_q_sample_given_eps(home):
    y_0, eps = random(2, 3, 5, 7, seed=1, device=home), random(2, 3, 5, 7, seed=2, device=home)
    y_t, same = ops.q_sample(y_0, 0.25, None, eps=eps)
    assert same is eps and same_bits(y_t, plain_q_sample(y_0, torch.tensor(0.25, device=home), eps))
    y_0.requires_grad_()
    assert same_bits(ops.q_sample(y_0, 1.0, 3)[0], y_0.detach())


def test_q_sample_in_place(home):
    y_0 = random(2, 3, 5, 7, seed=1, device=home)
    expected = ops.q_sample(y_0, 0.25, 5)[0]
    assert ops.q_sample(y_0, 0.25, 5, out=y_0)[0] is y_0 and same_bits(y_0, expected)


# ------------------------------------------------------------------------------------------- gradients


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(f, *tensors):
    """Gradients of a weighted sum of f's outputs; the weights tell elements apart."""
    outs = f(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = sum((o * random(*o.shape, seed=20 + i, device=o.device).to(o.dtype)).sum() for i, o in enumerate(outs))
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refine_gradients(home, dtype):
    y, eps_hat, _ = inputs((2, 3, 9, 11), home, dtype=dtype)
    z = random(2, 3, 9, 11, seed=5, device=home)
    for step in (1, 4):

        def plain(y, f, z, step=step):
            return plain_refine(y, f.to(y.dtype), 0.9, 0.5, z if step > 1 else z * 0)

        ours = gradients(lambda y, f, z, s=step: ops.refine(y, f, 0.9, 0.5, None, s, z=z), *leaves(y, eps_hat, z))
        simple = gradients(plain, *leaves(y, eps_hat, z))
        exact = gradients(plain, *leaves(y.double(), eps_hat.double(), z.double()))
        for name, *grads in zip(("y_t", "eps_hat", "z"), ours, simple, exact, strict=True):
            assert_as_exact_as_torch(*grads, name=name)


@pytest.mark.parametrize("name", ["everything", "no clip", "last"])
def test_solver_step_gradients(home, name):
    recip, ratio, clip, a, b, c0, c1, c2, s = ROWS[name]

    def plain(y, f, m1, m2, z):
        m = (recip * y - ratio * f).clamp(-clip, clip)
        return a * y + b * f + c0 * m + c1 * m1 + c2 * m2 + s * z, m

    def ours(y, f, m1, m2, z):
        return ops.solver_step(y, f, ROWS[name], None, 3, history=(m1, m2), z=z)

    y, eps_hat, history = inputs((2, 3, 9, 11), home)
    tensors = [y, eps_hat, *history, random(2, 3, 9, 11, seed=5, device=home)]
    grads = gradients(ours, *leaves(*tensors)), gradients(plain, *leaves(*tensors))
    exact = gradients(plain, *leaves(*(t.double() for t in tensors)))
    for key, *three in zip(("y", "eps_hat", "m1", "m2", "z"), *grads, exact, strict=True):
        assert_as_exact_as_torch(*three, name=key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_q_sample_gradients(home, dtype):
    y_0, eps = (random(2, 3, 9, 11, seed=i, device=home, dtype=dtype) for i in (1, 2))
    gamma = torch.tensor([0.3, 0.8], dtype=torch.float64, device=home)

    def ours(y_0, eps):
        return ops.q_sample(y_0, gamma, None, eps=eps)

    def plain(y_0, eps):
        return plain_q_sample(y_0, gamma, eps), eps

    grads = gradients(ours, *leaves(y_0, eps)), gradients(plain, *leaves(y_0, eps))
    exact = gradients(plain, *leaves(y_0.double(), eps.double()))
    for key, *three in zip(("y_0", "eps"), *grads, exact, strict=True):
        assert_as_exact_as_torch(*three, name=key)


def test_q_sample_gradient_of_drawn_noise(home):
    y_0 = random(2, 3, 9, 11, seed=1, device=home).requires_grad_()
    y_t, eps = ops.q_sample(y_0, 0.25, 5)
    (grad,) = torch.autograd.grad((y_t - eps).sum(), y_0)
    assert same_bits(grad, torch.full_like(grad, 0.5))


# --------------------------------------------------------------------------------------------- threads


@pytest.mark.skipif(isinstance(backend.load("cpp"), str), reason="no compiled module")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_threads(threads, layout):
    """The same bits with one thread and with two."""
    y, eps_hat, history = inputs((2, 3, 130, 131), "cpu", layout)
    results = []
    for n in (1, 2):
        threads(n)
        results.append(
            (
                *ops.solver_step(y, eps_hat, ROWS["everything"], 3, 2, history=history),
                *ops.q_sample(y, 0.3, 3, 2),
            )
        )
    assert all(map(same_bits, *results))
