"""Schedules against Janspiry's formulas, stated here entry by entry, and against their own inverse."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from sr3fast.schedule import NAMES, Schedule, half_logsnr, sigmoid2


def beta(name, t, T, start, end):
    """beta_t, t = 1..T, one entry at a time."""

    def line(a, b, i, n):
        return a + (b - a) * i / (n - 1)

    i = t - 1
    if name == "linear":
        return line(start, end, i, T)
    if name == "quad":
        return line(math.sqrt(start), math.sqrt(end), i, T) ** 2
    if name in ("warmup10", "warmup50"):
        n = int(T * int(name[-2:]) / 100)
        return line(start, end, i, n) if i < n else end
    if name == "const":
        return end
    if name == "cosine":

        def a(k):
            return math.cos((k / T + 0.008) / 1.008 * math.pi / 2) ** 2

        return min(1 - a(t) / a(t - 1), 0.999)
    raise AssertionError(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "jsd"])
def test_named_is_the_stated_formula(name):
    T, start, end = 400, 1e-4, 6e-2
    schedule = Schedule.named(name, T=T, start=start, end=end)
    assert schedule.alpha.dtype == schedule.gamma.dtype == torch.float64
    assert schedule.alpha.shape == schedule.gamma.shape == (T + 1,)
    assert schedule.alpha[0] == 1 and schedule.gamma[0] == 1
    product = 1.0
    for t in range(1, T + 1):
        expected = beta(name, t, T, start, end)
        assert 1 - schedule.alpha[t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        product *= 1 - expected
        assert schedule.gamma[t].item() == pytest.approx(product, rel=1e-9)


def test_sr3_default_ends_where_janspirys_does():
    schedule = Schedule.named()
    assert schedule.T == 2000
    assert schedule.gamma[-1].item() == pytest.approx(4.39e-5, rel=1e-3)
    # the cumulative product itself, as numpy forms it in float64
    assert np.array_equal(schedule.gamma[1:].numpy(), np.cumprod(1 - np.linspace(1e-6, 1e-2, 2000)))


def test_jsd_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=r"beta_100 = 1 of T = 100 .*infinite"):
        Schedule.named("jsd", T=100)


@pytest.mark.parametrize(
    "betas, message",
    [
        ([0.1, 1.5], r"beta_2 = 1.5"),
        ([0.1, -0.1], r"beta_2 = -0.1"),
        ([0.1, float("nan")], r"finite: got beta_2 = nan"),
        ([0.1, float("inf")], r"finite: got beta_2 = inf"),
        ([0.0, 0.1], r"gamma_1 must be below 1"),
        ([[0.1]], r"vector"),
        ([], r"vector"),
        ([0.999] * 100, r"gamma_T must be at least"),
    ],
)
def test_betas_out_of_range(betas, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_betas(betas)


@pytest.mark.parametrize(
    "arguments, message",
    [(("sigmoid",), "linear, quad"), (("linear", 0), "at least 1")],
)
def test_named_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule.named(*arguments)
    for T in (2.5, True, "8"):
        with pytest.raises(TypeError, match="T must be a whole number: got"):
            Schedule.named("linear", T)
    assert Schedule.named("linear", np.int64(8)).T == 8


def test_from_betas_takes_what_checkpoints_hold():
    betas = torch.linspace(1e-4, 2e-2, 1000)  # float32, as a checkpoint's buffer
    schedule = Schedule.from_betas(betas)
    assert torch.equal(schedule.betas, betas.double())
    assert schedule == Schedule.from_betas(betas.double().tolist())
    assert schedule != Schedule.named("linear", T=1000, start=1e-4, end=2e-2)


@pytest.mark.parametrize(
    "schedule",
    [Schedule.named("cosine", T=30), Schedule.named(), Schedule.from_betas([0.3, 0.9, 0.95])],
    ids=repr,
)
def test_config_round_trip_through_json(schedule):
    again = Schedule.from_config(json.loads(json.dumps(schedule.config)))
    assert torch.equal(again.gamma, schedule.gamma) and torch.equal(again.alpha, schedule.alpha)


@pytest.mark.parametrize("config", [{}, {"T": 10}, {"betas": [0.1], "T": 1}, {"name": "const", "n": 5}])
def test_config_with_other_keys(config):
    with pytest.raises(ValueError, match="a schedule has name, T, start, end, or betas alone"):
        Schedule.from_config(config)


def test_much_signal_left_is_warned_about():
    with pytest.warns(UserWarning, match=r"gamma_T = 0.605 at T = 100 .* steps="):
        Schedule.named(T=100)  # n_timestep lowered, betas kept: the users' habit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule.named()


def test_gamma_at_interpolates_the_logarithm():
    schedule = Schedule.named(T=2000)
    whole = torch.arange(2001.0, dtype=torch.float64)
    assert torch.equal(schedule.gamma_at(whole), schedule.gamma)
    assert schedule.gamma_at(7.25).item() == pytest.approx(
        (schedule.gamma[7] ** 0.75 * schedule.gamma[8] ** 0.25).item(), rel=1e-14
    )
    t = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2000
    assert torch.allclose(schedule.t_at(schedule.gamma_at(t)), t, rtol=0, atol=1e-6)
    for outside in (-0.1, 2000.1, float("nan")):
        with pytest.raises(ValueError, match=r"t must be in \[0, 2000\]"):
            schedule.gamma_at(outside)


def test_half_logsnr_and_back():
    gamma = torch.tensor([1e-9, 4.4e-5, 0.3, 0.5, 0.999999], dtype=torch.float64)
    assert half_logsnr(gamma)[3] == 0
    assert half_logsnr(gamma)[2].item() == pytest.approx(0.5 * math.log(0.3 / 0.7))
    assert torch.allclose(sigmoid2(half_logsnr(gamma)), gamma, rtol=1e-12, atol=0)
