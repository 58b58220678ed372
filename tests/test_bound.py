"""The variational bound: in closed form, from a few levels, and the bins of its decoder."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from sr3fast.bound import choose, log_bin, variational_bound
from sr3fast.schedule import Schedule

V = 0.3


def optimal(x, y_t, level):
    """E[eps given y_t], where y_0 ~ N(0, V)."""
    g = level.view(-1, 1, 1, 1).square()
    return (1 - g).sqrt() / (g * V + 1 - g) * y_t


def gaussian(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * math.sqrt(V)


def expected_kl(schedule, t):
    """In bits, the mean over y_t, and the part that one draw of it moves."""
    a, g, before = (value.item() for value in (schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]))
    ratio = (1 - before) / (1 - g)
    left = g * V / (g * V + 1 - g)  # the variance of eps given y_t
    mean_error = (1 - a) / (a * (1 - g)) * left
    bits = 0.5 / math.log(2)
    return bits * (ratio - 1 - math.log(ratio) + mean_error), bits * mean_error


def test_a_gaussian_in_closed_form():
    schedule = Schedule.named(T=40, start=1e-4, end=0.3)
    y_0 = gaussian(4, 1, 128, 128)
    bound = variational_bound(optimal, None, y_0, schedule, seed=3)
    assert list(bound["kl"]) == list(range(2, 41))
    for t, kl in bound["kl"].items():
        expected, drawn = expected_kl(schedule, t)
        assert abs(kl - expected) < 5 * drawn * math.sqrt(2 / y_0.numel())
    g = schedule.gamma[-1].item()
    expected = 0.5 / math.log(2) * (g * y_0.double().square().mean().item() - g - math.log(1 - g))
    assert bound["prior"] == pytest.approx(expected, rel=1e-9)
    total = bound["prior"] + bound["decoder"] + sum(bound["kl"].values())
    assert bound["bits"] == pytest.approx(total, rel=1e-12)
    some = variational_bound(optimal, None, y_0, schedule, seed=3, steps=10)
    assert len(some["kl"]) == 9
    assert all(kl == pytest.approx(bound["kl"][t], rel=1e-12) for t, kl in some["kl"].items())


@pytest.mark.filterwarnings("ignore:gamma_T")
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.named(),  # SR3's
        Schedule.named("cosine", 1000),
        Schedule.named("const", 500, end=0.02),
        Schedule.named("linear", 1000, 1e-4, 2e-2),
    ],
    ids=["sr3", "cosine", "const", "ddpm"],
)
def test_a_few_levels_estimate_all(schedule):
    """The exact bound is the closed form's; the tolerance leaves room for the noise of one draw."""
    y_0 = gaussian(1, 1, 64, 64)
    exact = sum(expected_kl(schedule, t)[0] for t in range(2, schedule.T + 1))
    for steps, tolerance in ((25, 0.02), (100, 0.01)):
        bound = variational_bound(optimal, None, y_0, schedule, seed=3, steps=steps)
        sum_kl = bound["bits"] - bound["prior"] - bound["decoder"]
        assert sum_kl == pytest.approx(exact, rel=tolerance), steps


@pytest.mark.parametrize("name", ["linear", "cosine", "quad"])
def test_levels_are_distinct_and_even_in_lambda(name):
    schedule = Schedule.named(name, 200, 1e-5, 0.1)
    for steps in (2, 3, 25, 199, 200):
        t = choose(schedule, steps)
        assert len(t) == steps and t[0] == 1 and t[-1] == 200 and (np.diff(t) > 0).all()
    assert choose(schedule, 200) == list(range(1, 201))


def test_a_schedule_whose_steps_add_no_noise_everywhere():
    betas = torch.linspace(1e-3, 0.3, 40)
    betas[[10, 11, 39]] = 0
    bound = variational_bound(optimal, None, gaussian(1, 1, 16, 16), Schedule.from_betas(betas))
    assert bound["kl"][11] == bound["kl"][12] == bound["kl"][40] == 0 and math.isfinite(bound["bits"])


def test_steps_outside_their_range():
    schedule = Schedule.named(T=40, start=1e-4, end=0.3)
    for steps in (1, 41):
        with pytest.raises(ValueError, match=rf"steps must lie in 2\.\.T = 40: got {steps}"):
            variational_bound(optimal, None, gaussian(1, 1, 4, 4), schedule, steps=steps)


def test_bins_of_the_decoder_are_the_normal_distributions():
    y = (torch.tensor([0, 1, 100, 128, 254, 255]).double() / 255 * 2 - 1)[None]
    for mean, std in ((0.0, 0.1), (-1.0, 0.01), (0.99, 0.003)):
        edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255 * 2 - 1, [np.inf]])
        levels = [0, 1, 100, 128, 254, 255]
        upper, lower = ((edges[[i + d for i in levels]] - mean) / std for d in (1, 0))
        flip = lower > 0
        upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
        high, low = norm.logcdf(upper), norm.logcdf(lower)
        expected = high + np.log1p(-np.exp(low - high))
        got = log_bin(y, torch.full_like(y, mean), std)[0]
        assert torch.allclose(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    every = torch.linspace(-1, 1, 256, dtype=torch.float64)
    assert log_bin(every, torch.full_like(every, 0.37), 0.2).exp().sum().item() == pytest.approx(1)


def test_dropout_is_no_part_of_the_bound():
    torch.manual_seed(0)
    f_theta = torch.nn.Dropout(0.5).train()
    y_0 = torch.zeros(1, 1, 4, 4)
    schedule = Schedule.named("linear", T=10, start=1e-4, end=0.5)
    bounds = [variational_bound(lambda x, y, _: f_theta(y), None, y_0, schedule)["bits"] for _ in range(2)]
    assert bounds[0] != bounds[1]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = f_theta

        def forward(self, x, y_t, level):
            return self.drop(y_t)

    bounds = [variational_bound(Network(), None, y_0, schedule)["bits"] for _ in range(2)]
    assert bounds[0] == bounds[1] and f_theta.training
