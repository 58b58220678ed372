"""The sampler against Algorithm 2 written out, and every promise of its docstring."""

import gc
import logging
import math
import resource
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sr3fast import ops
from sr3fast.engine import Engine
from sr3fast.sampler import Sampler
from sr3fast.schedule import Schedule
from sr3fast.solver import SOLVERS, rows
from sr3fast.unet import UNet
from sr3fast.weights import Target

SCHEDULE = Schedule.named("linear", T=40, start=1e-4, end=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def f_theta(x, y_t, level):
    """Roughly a denoiser towards x, sample by sample and pixel by pixel: batches cannot change its bits."""
    gamma = level.view(-1, 1, 1, 1) ** 2
    return (1 - gamma).sqrt() * (y_t - gamma.sqrt() * x) + 0.1 * torch.sin(3 * y_t) * x


def blind(x, y_t, level):
    assert x is None
    return 0.8 * y_t * (1 - level.view(-1, 1, 1, 1))


@pytest.fixture
def x():
    """[3, 3, 12, 20] in [-1, 1], off zero mean."""
    return torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(5)) * 1.9 - 1


@pytest.fixture
def unet():
    torch.manual_seed(3)
    return UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(6,), groups=4, image_size=12)


# ------------------------------------------------------------------------------------ Algorithm 2


def test_it_is_algorithm_2(x):
    """The paper's loop, on the one noise, bit for bit."""
    seed = 11
    y = ops.noise(x.shape, seed, domain=0)
    for t in range(SCHEDULE.T, 0, -1):
        alpha, gamma = (SCHEDULE.gamma[t] / SCHEDULE.gamma[t - 1]).item(), SCHEDULE.gamma[t].item()
        level = torch.tensor(gamma, dtype=torch.float64).sqrt().float().expand(3, 1)
        y = ops.refine(y, f_theta(x, y, level), alpha, gamma, seed, t)
    assert torch.equal(Sampler(f_theta, SCHEDULE)(x, seed), y)


@pytest.mark.parametrize("corrector_steps", [0, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_in_float64(x, solver, corrector_steps):
    """The rows written out with a history that is a plain list."""
    options = dict(solver=solver, steps=9, corrector_steps=corrector_steps)
    table = rows(SCHEDULE, **options)
    N, seed = len(table), 5
    y, ms = ops.noise(x.shape, seed, domain=0).double(), []
    for i, row in enumerate(table.rows.double()):
        recip, ratio, clip, A, B, C0, C1, C2, S = row.tolist()
        f = f_theta(x.double(), y, table.gamma[i].sqrt().expand(3, 1))
        m = (recip * y - ratio * f).clamp(-clip, clip)
        y = A * y + B * f + C0 * m
        y = y + (C1 * ms[-1] if C1 else 0) + (C2 * ms[-2] if C2 else 0)
        y = y + (S * ops.noise(x.shape, seed, step=N - i) if S else 0)
        if C0:
            ms.append(m)
    sampled = Sampler(f_theta, SCHEDULE, **options)(x, seed)
    assert sampled.dtype == torch.float32
    assert (sampled - y).abs().max() < 2e-5


@pytest.mark.parametrize("options", [{}, {"steps": 6}, {"steps": 6, "solver": "unipc2", "corrector_steps": 1}])
def test_iterate_yields_what_the_call_returns(x, options):
    sampler = Sampler(f_theta, SCHEDULE, **options)
    N = len(sampler.table)
    steps, ys = zip(*sampler.iterate(x, 4), strict=True)
    assert list(steps) == list(range(N - 1, -1, -1))
    assert torch.equal(ys[-1], sampler(x, 4))
    assert len({y.data_ptr() for y in ys}) == N, "each y is the caller's to keep"
    # each follows from the one before: nothing was overwritten
    if sampler.table.depth == 0:
        again = list(sampler.iterate(x, 4))
        assert all(torch.equal(a, b) for a, (_, b) in zip(ys, again, strict=True))


@pytest.mark.parametrize("level", ["sqrt_gamma", "gamma", "t"])
def test_level_as_it_was_asked_for(x, level):
    seen = []

    def network(x, y_t, level):
        seen.append(level)
        return y_t * 0.5

    sampler = Sampler(network, SCHEDULE, level=level, steps=5)
    sampler(x)
    expected = {
        "sqrt_gamma": sampler.table.gamma.sqrt().float(),
        "gamma": sampler.table.gamma.float(),
        "t": sampler.table.t - 1,  # the index into betas
    }[level]
    for given, e in zip(seen, expected, strict=True):
        assert given.dtype == e.dtype and given.shape == ((3,) if level == "t" else (3, 1))
        assert (given == e).all()


def test_network_may_keep_and_overwrite_its_inputs(x):
    kept = []

    def careless(x, y_t, level):
        kept.append(y_t)
        eps_hat = f_theta(x, y_t, level)
        level.zero_()
        return eps_hat

    def vandal(x, y_t, level):
        eps_hat = f_theta(x, y_t, level)
        y_t.fill_(math.nan)
        return eps_hat

    honest = Sampler(f_theta, SCHEDULE, steps=5)
    states = [ops.noise(x.shape, 0, domain=0), *(y for _, y in honest.iterate(x))]
    assert torch.equal(Sampler(careless, SCHEDULE, steps=5)(x), states[-1])
    assert all(torch.equal(k, s) for k, s in zip(kept, states, strict=False)) and len(kept) == 5
    assert torch.equal(Sampler(vandal, SCHEDULE, steps=5)(x), states[-1])


# ------------------------------------------------------------------------------------------- seed


@pytest.mark.parametrize("solver", ["sr3", "dpm++2m", "sde-dpm++2m"])
def test_a_batch_is_its_samples(x, solver):
    sampler = Sampler(f_theta, SCHEDULE, solver=solver, steps=8)
    batch = sampler(x, 100)
    for i in range(3):
        assert torch.equal(sampler(x[i : i + 1], 100 + i), batch[i : i + 1])
    assert torch.equal(sampler(x, [100, 101, 102]), batch)
    assert torch.equal(sampler(x, torch.tensor([100, 101, 102])), batch)
    assert torch.equal(sampler(x.flip(0), [102, 101, 100]), batch.flip(0))
    assert not torch.equal(sampler(x, 101), batch)


def test_a_batch_of_8_shows_the_pictures_of_8_calls(unet):
    """With a network whose convolutions may round differently in a batch: within 1/255 at 25 steps."""
    x = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sampler = Sampler(unet, Schedule.named(), steps=25)
    batch = sampler(x, 2**64 - 4)  # and the seeds wrap around
    alone = torch.cat([sampler(x[i : i + 1], (2**64 - 4 + i) % 2**64) for i in range(8)])
    assert (batch - alone).abs().max() < 1 / 255


def test_seed_none_is_drawn_and_reported(x, caplog):
    sampler = Sampler(f_theta, SCHEDULE, steps=4)
    with caplog.at_level(logging.INFO, "sr3fast"):
        first = sampler(x, seed=None)
    seed = sampler.last_seed
    assert str(seed) in caplog.text
    assert torch.equal(sampler(x, seed=seed), first)
    sampler(x, seed=None)
    assert sampler.last_seed != seed


def test_the_last_seed_is_told_as_it_came(x):
    sampler = Sampler(f_theta, SCHEDULE, steps=2)
    for seed, told in ((np.int64(3), 3), ([2**64 - 1], [2**64 - 1]), (torch.tensor([7]), [7])):
        sampler(x[:1], seed)
        assert sampler.last_seed == told and sampler(x[:1], sampler.last_seed) is not None


def test_global_generator_is_not_touched(x):
    before = torch.get_rng_state()
    Sampler(f_theta, SCHEDULE)(x, None)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------- where it begins, and z


def test_y_T_in_place_of_noise(x):
    sampler = Sampler(f_theta, SCHEDULE, steps=5)
    y_T = ops.noise(x.shape, 3, domain=0)
    copy = y_T.clone()
    assert torch.equal(sampler(x, 3, y_T=y_T), sampler(x, 3))
    assert torch.equal(y_T, copy), "the caller's tensor is left alone"
    assert not torch.equal(sampler(x, 3, y_T=-y_T), sampler(x, 3))


def test_z_is_asked_for_steps_that_add_noise(x):
    asked = []

    def z(step):
        asked.append(step)
        return ops.noise(x.shape, 6, step=step)

    sampler = Sampler(f_theta, SCHEDULE)
    assert torch.equal(sampler(x, 6, z=z), sampler(x, 6))
    assert asked == list(range(SCHEDULE.T, 1, -1)), "never at step 1"
    asked.clear()
    Sampler(f_theta, SCHEDULE, steps=5)(x, 6, z=z)
    assert asked == []
    half = Sampler(f_theta, SCHEDULE)(x, 6, z=lambda step: 0.5 * z(step))
    assert not torch.equal(half, sampler(x, 6))


def test_start_begins_from_the_diffused_source(x):
    sampler = Sampler(f_theta, SCHEDULE, solver="ddim", steps=10)
    seen = []
    y = sampler(x, 2, start=0.7, callback=lambda step, y, m: seen.append(step))
    assert seen == [2, 1, 0]
    gamma = sampler.table.gamma[7].item()
    y_start = ops.q_sample(x, gamma, None, eps=ops.noise(x.shape, 2, domain=0))[0]
    tail = Sampler(f_theta, SCHEDULE, solver="ddim", grid=sampler.table.gamma[7:])
    assert torch.equal(tail(x, 2, y_T=y_start), y)
    assert sampler(x, 2, start=0.9).sub(x).abs().mean() < sampler(x, 2, start=0.1).sub(x).abs().mean()


def test_a_grid_that_begins_later_needs_a_start(x):
    sampler = Sampler(f_theta, SCHEDULE, grid=[0.3, 0.7, 0.99])
    with pytest.raises(ValueError, match=r"begins at gamma = 0.3, later than gamma_T = .*: give y_T"):
        sampler(x)
    assert sampler(x, y_T=x).isfinite().all()
    assert sampler(x, start=0.0).isfinite().all()


def test_unconditional():
    sampler = Sampler(blind, SCHEDULE, steps=4)
    y = sampler(None, 9, shape=(2, 1, 5, 7))
    assert y.shape == (2, 1, 5, 7)
    assert torch.equal(sampler(None, [9, 10], y_T=ops.noise((2, 1, 5, 7), 9, domain=0)), y)
    with pytest.raises(ValueError, match=r"shape=\(B, C, H, W\) must say"):
        sampler(None)


def test_x_with_other_channels_than_y(x):
    def thirteen_to_one(x, y_t, level):
        return 0.3 * y_t + x.mean(1, keepdim=True)

    bands = torch.rand(2, 13, 6, 6) - 0.7
    assert Sampler(thirteen_to_one, SCHEDULE, steps=3)(bands, shape=(2, 1, 6, 6)).shape == (2, 1, 6, 6)
    unet = UNet(channels=8, multipliers=(1,), blocks=1, attention=(), groups=4, in_channels=5, out_channels=1)
    assert Sampler(unet, SCHEDULE, steps=3)(x[:, :1].repeat(1, 4, 1, 1)).shape == (3, 1, 12, 20)


# ------------------------------------------------------------------------------ what comes with it


def test_samples_with_mean_and_deviation(x):
    sampler = Sampler(f_theta, SCHEDULE, solver="ddpm", steps=6)
    y_0, mean, std = sampler(x[:1], 20, samples=4)
    assert torch.equal(y_0, torch.cat([sampler(x[:1], 20 + i) for i in range(4)]))
    assert torch.allclose(mean, y_0.mean(0)) and torch.allclose(std, y_0.std(0))
    assert mean.shape == std.shape == x.shape[1:] and std.min() > 0
    free = Sampler(blind, SCHEDULE, steps=3)(None, shape=(1, 1, 4, 4), samples=3)
    assert free.y_0.shape == (3, 1, 4, 4)
    for n, message in ((1, "at least 2"), (2.0, "whole number")):
        with pytest.raises(ValueError, match=message):
            sampler(x[:1], samples=n)
    with pytest.raises(ValueError, match="one source: got a batch of 3"):
        sampler(x, samples=2)


def test_consistency_shrinks_to_the_source(x):
    from sr3fast.image import resize

    sampler = Sampler(f_theta, SCHEDULE, steps=5, scale=4)
    x = resize(resize(x, (3, 5)), (12, 20))
    shifted, cured = sampler(x), sampler(x, consistency=True)

    def distance(y):
        return (resize(y, (3, 5)) - resize(x, (3, 5))).square().mean()

    assert torch.allclose(cured, shifted + resize(resize(x, (3, 5)) - resize(shifted, (3, 5)), (12, 20)), atol=1e-6)
    assert distance(cured) < 0.1 * distance(shifted)


@pytest.mark.parametrize("scale, message", [(None, r"Sampler\(..., scale=4\)"), (8, "sides that scale=8 divides")])
def test_consistency_refused(x, scale, message):
    with pytest.raises(ValueError, match=message):
        Sampler(f_theta, SCHEDULE, steps=5, scale=scale)(x, consistency=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_callback_sees_each_step(x, solver):
    seen = []
    sampler = Sampler(f_theta, SCHEDULE, solver=solver, steps=6, corrector_steps=1)
    y_0 = sampler(x, 1, callback=lambda *args: seen.append(args))
    assert torch.equal(sampler(x, 1), y_0), "looking changes nothing"
    y = ops.noise(x.shape, 1, domain=0)
    for i, (step, after, y_0_hat) in enumerate(seen):
        assert step == len(sampler.table) - 1 - i
        recip, ratio, clip = sampler.table.rows[i, :3]
        f = f_theta(x, y, sampler.table.gamma[i].sqrt().float().expand(3, 1))
        m = recip * y - ratio * f
        assert torch.equal(y_0_hat, m.clamp(-clip, clip))
        y = after
    assert torch.equal(y, y_0)


def test_frames(x):
    sampler = Sampler(f_theta, SCHEDULE, solver="dpm++2m", steps=9)
    states = dict(sampler.iterate(x, 8))
    steps, pictures = zip(*sampler.frames(x, 8, count=4), strict=True)
    assert steps == (9, 6, 3, 0)
    assert torch.equal(pictures[0], ops.noise(x.shape, 8, domain=0).clamp(-1, 1))
    for step, picture in zip(steps[1:], pictures[1:], strict=True):
        assert torch.equal(picture, states[step].clamp(-1, 1))
    estimates = {}
    sampler(x, 8, callback=lambda step, y, y_0_hat: estimates.update({step: y_0_hat}))
    shown = dict(sampler.frames(x, 8, count=5, of="y_0_hat"))
    assert list(shown) == [8, 6, 4, 2, 0]
    assert all(torch.equal(picture, estimates[step].clamp(-1, 1)) for step, picture in shown.items())
    with pytest.raises(ValueError, match="count"):
        sampler.frames(x, count=1)
    with pytest.raises(ValueError, match="of must be"):
        sampler.frames(x, of="x")


def test_progress_bar(x, capsys):
    sampler = Sampler(f_theta, SCHEDULE, steps=7)
    sampler(x)
    assert capsys.readouterr().err == ""
    sampler(x, progress=True)
    assert "7/7" in capsys.readouterr().err


def test_residual_target_becomes_an_image(x):
    residual = Target("residual", k=4.0, clip=0.5)
    sampler = Sampler(f_theta, SCHEDULE, steps=5, target=residual)
    assert sampler.table.rows[0, 2] == 0.5, "the target's clip"
    *_, (_, y_0) = sampler.iterate(x, 3)
    assert y_0.abs().max() <= 0.5
    assert torch.equal(sampler(x, 3), x + y_0 / 4)
    assert torch.equal(list(sampler.frames(x, 3))[-1][1], (x + y_0 / 4).clamp(-1, 1))
    begun = next(sampler.frames(x, 3, start=0.4))[1]  # x itself has no residual
    gamma = sampler.table.gamma[2].item()
    y_start = math.sqrt(1 - gamma) * ops.noise(x.shape, 3, domain=0)
    assert torch.allclose(begun, (x + y_start / 4).clamp(-1, 1), atol=1e-6)
    assert Sampler(f_theta, SCHEDULE, steps=5, target=residual, clip=None).table.rows[0, 2] == math.inf
    with pytest.raises(ValueError, match="a residual target needs x"):
        sampler(x, shape=(3, 1, 12, 20))


# ------------------------------------------------------------------------- dtype, device, modules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_networks_and_the_state_stays_float32(x, dtype):
    seen = []

    def network(x, y_t, level):
        seen.append((x.dtype, y_t.dtype, level.dtype))
        return f_theta(x, y_t, level.to(dtype))

    half = Sampler(network, SCHEDULE, steps=6, dtype=dtype)(x, 1)
    assert set(seen) == {(dtype, dtype, torch.float32)} and half.dtype == torch.float32
    assert (half - Sampler(f_theta, SCHEDULE, steps=6)(x, 1)).abs().max() < 40 * torch.finfo(dtype).eps
    assert not torch.equal(half, half.to(dtype).float()), "not rounded to the network's dtype"


def test_dtype_of_a_module_is_its_own(x):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x, y_t, level):
            assert x.dtype == y_t.dtype == torch.bfloat16
            return self.scale * y_t

    assert Sampler(Half(), SCHEDULE, steps=3)(x).dtype == torch.float32


def test_a_network_in_float64_is_given_float64(x):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

        def forward(self, x, y_t, level):
            assert x.dtype == y_t.dtype == torch.float64
            return self.weight * (x + y_t)

    y_0 = Sampler(Linear(), SCHEDULE, steps=4)(x)
    assert y_0.dtype == torch.float32
    torch.testing.assert_close(y_0, Sampler(lambda x, y, level: 0.25 * (x + y), SCHEDULE, steps=4)(x))


def test_float64_and_integer_sources_are_taken(x):
    sampler = Sampler(f_theta, SCHEDULE, steps=4)
    assert torch.equal(sampler(x.double()), sampler(x))
    eps = Sampler(lambda x, y, level: f_theta(x, y, level).double(), SCHEDULE, steps=4)
    assert torch.equal(eps(x), sampler(x))


def test_f_theta_may_overwrite_what_it_is_given(x):
    def overwriting(x, y, level):
        eps_hat = f_theta(x, y, level)
        for t in (x, y, level):
            t.zero_()
        return eps_hat

    source = x.clone()
    assert torch.equal(Sampler(overwriting, SCHEDULE, steps=4)(x), Sampler(f_theta, SCHEDULE, steps=4)(x))
    assert torch.equal(x, source)


def test_channels_last_source_gives_the_same_bits(x):
    sampler = Sampler(f_theta, SCHEDULE, steps=4)
    assert torch.equal(sampler(x.to(memory_format=torch.channels_last)), sampler(x))


def test_dropout_is_off_and_modes_come_back(x):
    network = nn.Module()
    network.drop = nn.Dropout(0.5)
    network.frozen = nn.Dropout(0.5).eval()
    network.forward = lambda x, y_t, level: network.frozen(network.drop(f_theta(x, y_t, level)))
    assert torch.equal(Sampler(network, SCHEDULE, steps=4)(x), Sampler(f_theta, SCHEDULE, steps=4)(x))
    assert network.training and network.drop.training and not network.frozen.training


def test_weights_that_change_between_calls_are_followed(unet):
    x = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sampler = Sampler(unet, SCHEDULE, steps=2)
    before = sampler(x)
    with torch.no_grad():
        unet.conv_out.bias.add_(0.3)
    after = sampler(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, Sampler(unet, SCHEDULE, steps=2)(x))


def test_no_graph_is_built(x, unet):
    x = x[:, :, :, :12].clone().requires_grad_()
    sampler = Sampler(unet, SCHEDULE, steps=2, scale=4)
    assert not sampler(x, consistency=True).requires_grad
    for _, y in sampler.iterate(x):
        assert not y.requires_grad
        assert torch.is_grad_enabled(), "the caller's mode is the caller's"
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------------------------- leaves nothing


def test_stopping_early_leaves_nothing_behind(x, unet):
    x = x[:, :, :, :12]
    unet.train()
    sampler = Sampler(unet, SCHEDULE)
    whole = sampler(x, 7)
    unet.train()

    steps = sampler.iterate(x, 7)
    next(steps), next(steps)
    steps.close()
    assert all(m.training for m in unet.modules()) and torch.is_grad_enabled()

    def interrupt(step, y, y_0_hat):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(x, 7, callback=interrupt)
    assert all(m.training for m in unet.modules()) and torch.is_grad_enabled()

    frames = sampler.frames(x, 7, progress=True)
    next(frames), next(frames)
    frames.close()
    assert all(m.training for m in unet.modules())
    assert torch.equal(sampler(x, 7), whole)


def test_two_runs_side_by_side(x):
    sampler = Sampler(f_theta, SCHEDULE, solver="unipc2", steps=6)
    pairs = list(zip(sampler.iterate(x, 1), sampler.iterate(x, 2), strict=True))
    assert torch.equal(pairs[-1][0][1], sampler(x, 1))
    assert torch.equal(pairs[-1][1][1], sampler(x, 2))


def test_memory_does_not_grow_with_the_steps():
    x = torch.rand(1, 3, 96, 96) - 0.5  # 110 kB a state: one kept a step would be 220 MB
    schedule = Schedule.named()
    for solver in ("sr3", "unipc2"):
        sampler = Sampler(lambda x, y, level: y * 0.9, schedule, solver=solver)
        tensors = []
        peak = 0
        for step, _ in sampler.iterate(x):
            if step in (1900, 100):
                tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            if step == 1900:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert tensors[0] == tensors[1]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16_000  # kB


# ------------------------------------------------------------------------------------ bad arguments


def test_sources_of_another_range_are_warned_about(x):
    sampler = Sampler(f_theta, SCHEDULE, steps=2)
    with pytest.warns(UserWarning, match=r"x looks like \[0, 1\] .*2 \* x - 1") as record:
        sampler((x + 1) / 2)
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match=r"x looks like uint8 .*x / 127.5 - 1") as record:
        next(sampler.iterate((x + 1) * 120))
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match="x looks like uint8"):
        sampler(((x + 1) * 120).to(torch.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(x)
        sampler(torch.zeros_like(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_warned_about_once(x, value):
    def broken(x, y_t, level):
        return f_theta(x, y_t, level).index_fill(0, torch.tensor([1]), value)

    sampler = Sampler(broken, SCHEDULE)
    for run in (sampler, lambda x: list(sampler.iterate(x)), lambda x: list(sampler.frames(x))):
        with pytest.warns(UserWarning, match="y_0 is not finite: f_theta gave infinity or NaN") as record:
            run(x)
        assert len(record) == 1 and record[0].filename == __file__


def refusing(x, y_t, level):
    raise AssertionError("f_theta ran before the arguments were checked")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 12, 20)), r"x must be \[B, C, H, W\]"),
        (dict(x=torch.zeros(1, 3, 0, 20)), "each at least 1"),
        (dict(x=torch.full((1, 3, 4, 4), math.nan)), "x must be finite"),
        (dict(x=torch.full((1, 3, 4, 4), math.inf)), "x must be finite"),
        (dict(shape=(3, 3, 12)), r"shape must be \(B, C, H, W\)"),
        (dict(shape=(2, 3, 12, 20)), "y's batch and size"),
        (dict(y_T=torch.zeros(3, 3, 12, 19)), r"y_T must be of shape \[3, 3, 12, 20\]: got \[3, 3, 12, 19\]"),
        (dict(y_T=torch.zeros(3, 3, 12, 20), shape=(3, 1, 12, 20)), "y_T must be of shape"),
        (dict(y_T=torch.zeros(3, 3, 12, 20), start=0.5), "y_T and start both"),
        (dict(start=1.0), r"start must be in \[0, 1\)"),
        (dict(start=0.5, shape=(3, 1, 12, 20)), "start begins from x"),
        (dict(seed=[1, 2]), "one seed a sample"),
        (dict(consistency=True), "consistency=True needs the enlargement"),
    ],
)
def test_values_refused_before_any_step(x, change, message):
    with pytest.raises(ValueError, match=message):
        Sampler(refusing, SCHEDULE, steps=3)(**{"x": x, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x="photo.png"), "x must be a tensor"),
        (dict(x=torch.zeros(1, 3, 4, 4, dtype=torch.complex64)), "real numbers"),
        (dict(y_T=torch.zeros(3, 3, 12, 20, dtype=torch.int64)), "y_T must be a float tensor"),
        (dict(z=torch.zeros(1)), "z must be callable"),
        (dict(seed="7"), "seed must be"),
        (dict(seed=1.5), "seed must be"),
    ],
)
def test_types_refused_before_any_step(x, change, message):
    with pytest.raises(TypeError, match=message):
        Sampler(refusing, SCHEDULE, steps=3)(**{"x": x, **change})


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(level="alpha"), ValueError, "level must be one of"),
        (dict(dtype=torch.float64), TypeError, "dtype must be"),
        (dict(graph="yes"), ValueError, "graph must be"),
        (dict(scale=0.5), ValueError, "scale must be at least 1"),
        (dict(steps=0), ValueError, "steps must be at least 1"),
        (dict(solver="sr3", clip=1.0), ValueError, "clips nothing"),
        (dict(eta=0.5), ValueError, "eta is an option of ddim"),
        (dict(device="cuda:77"), ValueError, "device cuda:77 is not there"),
        (dict(device="cpux"), ValueError, "device cpux is not there"),
    ],
)
def test_options_refused(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(f_theta, SCHEDULE, **options)


def test_networks_and_schedules_refused(unet):
    with pytest.raises(TypeError, match="f_theta must be callable"):
        Sampler(None, SCHEDULE)
    with pytest.raises(TypeError, match=r"schedule must be a sr3fast\.Schedule"):
        Sampler(f_theta, [0.1, 0.2])
    with pytest.raises(ValueError, match="a sr3 network is not conditioned on level='t'"):
        Sampler(unet, SCHEDULE, level="t")
    with pytest.raises(TypeError, match="parameters, or dtype=, must be float32"):
        Sampler(unet.double(), SCHEDULE)
    Sampler(unet, SCHEDULE, dtype=torch.float32)


def test_its_repr_says_what_runs():
    text = repr(Sampler(f_theta, SCHEDULE, steps=4))
    assert "4 rows" in text and "'solver': 'dpm++2m'" in text and "'clip': 1.0" in text
    assert "'clip': inf" in repr(Sampler(f_theta, SCHEDULE))


@pytest.mark.parametrize("eps_hat, message", [(torch.zeros(3, 1, 12, 20), r"got \[3, 1, 12, 20\]"), (None, "got None")])
def test_what_f_theta_returns_is_checked(x, eps_hat, message):
    with pytest.raises(ValueError, match=r"y_t's shape \[3, 3, 12, 20\]: " + message):
        Sampler(lambda x, y_t, level: eps_hat, SCHEDULE)(x)


def test_z_of_another_shape(x):
    with pytest.raises(ValueError, match="z"):
        Sampler(f_theta, SCHEDULE)(x, z=lambda step: torch.zeros(1))


def test_graph_needs_cuda(x):
    with pytest.raises(ValueError, match="graph=True captures a CUDA graph: got tensors on cpu"):
        Sampler(f_theta, SCHEDULE, graph=True)(x)
    assert Sampler(f_theta, SCHEDULE, steps=2, graph=False)(x).isfinite().all()


def test_a_network_that_starts_its_own_runs(x):
    class Recorded:
        def start_run(self, x, shape, levels):
            self.started = (x.shape, tuple(shape), levels)
            run = Recorded()
            run.x, run.into, run.levels = (
                x,
                torch.empty(shape, dtype=torch.bfloat16).mT.contiguous().mT,
                levels,
            )
            return run

        def __call__(self, i):
            return f_theta(self.x, self.into.float(), self.levels[i].expand(3, 1))

    def rounding(x, y_t, level):
        return f_theta(x, y_t.bfloat16().float(), level)

    network = Recorded()
    sampler = Sampler(network, SCHEDULE, steps=5)
    assert torch.equal(sampler(x), Sampler(rounding, SCHEDULE, steps=5)(x))
    assert network.started[:2] == (x.shape, tuple(x.shape))
    assert torch.equal(network.started[2], sampler.table.gamma.sqrt().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_noise_on_the_gpu(x):
    sampler = Sampler(f_theta, SCHEDULE, solver="sr3")
    assert (sampler(x.cuda(), 5).cpu() - sampler(x, 5)).abs().max() < 1e-4
    assert torch.equal(Sampler(f_theta, SCHEDULE, device="cuda")(x, 5), sampler(x.cuda(), 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graph_is_the_eager_run(x):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)).cuda()

    def convolutions(x, y_t, level):
        return network(torch.cat([x, y_t], 1)) * level.view(-1, 1, 1, 1)

    calls = []

    def counting(x, y_t, level):
        calls.append(1)  # work on the host, which a graph does not repeat
        return convolutions(x, y_t, level) + len(calls)

    eager, captured = (Sampler(convolutions, SCHEDULE, steps=8, graph=g)(x.cuda(), 2) for g in (False, True))
    assert (eager - captured).abs().max() < 1e-3
    with pytest.raises(RuntimeError, match="pass graph=False"):
        Sampler(counting, SCHEDULE, steps=8, graph=True)(x.cuda())


class Drops(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.9)
        self.start = torch.nn.Identity()  # a name that starts no runs

    def forward(self, x, y_t, level):
        return self.start(self.drop(y_t)) * 0.9


def test_dropout_stays_off_where_runs_overlap(x):
    network = Drops().train()
    sampler = Sampler(network, SCHEDULE, steps=4)
    alone = sampler(x)
    first, second = sampler.iterate(x), sampler.iterate(x)
    next(first), next(second)
    assert network.training and network.drop.training  # between the rows it is as the caller has it
    network.eval()
    for _ in first:
        pass
    assert torch.equal(list(second)[-1][1], alone)
    assert not network.training and not network.drop.training


def test_what_starts_its_own_runs_has_its_own_dtype_and_graph(unet):
    for options in ({"dtype": torch.bfloat16}, {"graph": True}):
        with pytest.raises(ValueError, match="Engine starts its own runs: give it dtype and graph, not the sampler"):
            Sampler(Engine(unet), SCHEDULE, **options)


def test_frames_know_their_arguments(x):
    with pytest.raises(TypeError, match="unexpected keyword argument 'callback'"):
        Sampler(f_theta, SCHEDULE, steps=3).frames(x, callback=print)
    with pytest.raises(ValueError, match="count must be at least 2: got 1"):
        Sampler(f_theta, SCHEDULE, steps=3).frames(x, count=1)


def test_whole_numbers_may_be_numpys(x):
    steps = np.int64(3)
    assert torch.equal(Sampler(f_theta, SCHEDULE, steps=steps)(x), Sampler(f_theta, SCHEDULE, steps=3)(x))
