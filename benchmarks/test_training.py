"""A training step (loss, gradient, clipping, optimizer, EMA) against the same step in plain PyTorch.

On a CPU a 6 M network, 64 x 64, batch 8; on a GPU the 97.8 M network, 128 x 128, batch 64, bfloat16 only. A step whose
gradient is not as close to float64's as plain PyTorch's own is not timed: the benchmark fails.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CLOCK, DEVICE, compile_wanted, interleave
from environment import environment
from sampling import Plain
from torch import Tensor, nn

from sr3fast import noise, ops
from sr3fast.training import TrainConfig, Trainer

GPU = DEVICE.type == "cuda"
BATCH, SIZE = (64, 128) if GPU else (8, 64)
NETWORK = {"channels": 64, "multipliers": (1, 2, 4, 8, 8), "attention": (16,), "groups": 32} if GPU else {}
LOW = "bfloat16 autocast"
BASELINE = f"eager {LOW}" if GPU else "eager float32"
NAMES = [
    *([] if GPU else ["eager float32"]),
    f"eager {LOW}",
    *([] if GPU else ["sr3fast float32"]),
    f"sr3fast {LOW}",
    *([f"sr3fast captured, {LOW}"] if GPU else []),
]


def trainer(low: bool, capture: bool = False, batch: int = BATCH) -> Trainer:
    return Trainer(
        TrainConfig(
            data=Path(),
            out=Path(),
            batch_size=batch,
            crop=SIZE,
            device=DEVICE.type,
            dtype="bfloat16" if low else "float32",
            capture=capture,
            **NETWORK,
        )
    )


def micro_batch(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    pictures = ops.noise((2 * batch, 3, SIZE, SIZE), 0).clamp(-1, 1)
    return pictures[:batch], pictures[batch:]


class Eager:
    """Algorithm 1 as people write it: NCHW, PyTorch's layers and random numbers, an EMA parameter by parameter."""

    def __init__(self, start: Trainer, low: bool, compiled: bool = False):
        self.unet, self.low, self.schedule = copy.deepcopy(start.unet), low, start.model.schedule
        self.unet.to(memory_format=torch.contiguous_format)
        self.averaged = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.unet.parameters(), 1e-4)
        plain: nn.Module = Plain(self.unet)
        self.f_theta = torch.compile(plain) if compiled else plain

    def loss(self, x: Tensor, y_0: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
        g = gamma[:, None, None, None]
        y_t = g.sqrt() * y_0 + (1 - g).sqrt() * eps
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.low):
            eps_hat = self.f_theta(x, y_t, gamma.sqrt()[:, None])
        return F.mse_loss(eps_hat.to(eps.dtype), eps)

    def step(self, x: Tensor, y_0: Tensor) -> float:
        x, y_0 = x.to(DEVICE), y_0.to(DEVICE)
        t = torch.randint(1, self.schedule.T + 1, (len(x),))
        high, low = self.schedule.gamma[t - 1], self.schedule.gamma[t]
        gamma = (low + torch.rand(len(x)) * (high - low)).float().to(DEVICE)
        self.optimizer.zero_grad()
        loss = self.loss(x, y_0, gamma, torch.randn_like(y_0))
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(self.averaged.parameters(), self.unet.parameters(), strict=True):
                mean.lerp_(parameter, 1e-4)
        return loss.item()


def check_gradient(low: bool) -> None:
    """Ours is as near to the float64 gradient as plain PyTorch's, on the same weights, pictures and noise."""
    batch = 2
    ours = trainer(low, batch=batch)
    x, y_0 = micro_batch(batch)
    inputs = ours._inputs(x, y_0, 0)
    gamma, seeds = inputs[2], inputs[4]
    eps = ops.noise(y_0.shape, seeds.tolist(), domain=noise.TRAIN, step=0).to(DEVICE)
    plain = Eager(ours, low)
    exact = Eager(ours, False)
    exact.unet.double()

    ours.loss(*inputs)
    plain.loss(x.to(DEVICE), y_0.to(DEVICE), gamma.float(), eps).backward()
    exact.loss(*(t.to(DEVICE).double() for t in (x, y_0, gamma, eps))).backward()

    def gradient(unet: nn.Module) -> Tensor:
        return torch.cat([p.grad.flatten().double() for p in unet.parameters()])

    truth = gradient(exact.unet)
    error, allowed = ((gradient(unet) - truth).norm() / truth.norm() for unet in (ours.unet, plain.unet))
    if not error <= 2 * allowed + 1e-6:
        raise AssertionError(f"our gradient is off by {error:.3g}, plain PyTorch's by {allowed:.3g}: it is not timed")


def step_of(name: str) -> Callable[[int], object]:
    """One step of the contestant of that name."""
    low = LOW in name
    ours = trainer(low, capture="captured" in name)
    batch = micro_batch()
    if name.startswith("sr3fast"):
        return lambda _: ours.step(iter([batch]))
    eager = Eager(ours, low, compiled="compile" in name)
    return lambda _: eager.step(*batch)


@pytest.fixture(scope="module")
def times():
    for low in (True,) if GPU else (False, True):
        check_gradient(low)
    found = interleave({name: step_of(name) for name in NAMES}, seconds=60, rounds=(5, 15))
    yield found
    if GPU:
        torch.cuda.empty_cache()


@pytest.mark.benchmark(timer=CLOCK, group=f"a training step, batch {BATCH}, {SIZE} x {SIZE}")
@pytest.mark.parametrize("name", NAMES)
def test_training(benchmark, results, times, name):
    ms = {k: statistics.median(v) for k, v in times.items()}
    record = {
        "implementation": name,
        "batch": BATCH,
        "size": SIZE,
        "ms_a_step": ms[name],
        "times_faster": ms[BASELINE] / ms[name],
        "images_a_second": BATCH / ms[name] * 1e3,
    }
    benchmark.extra_info.update(record, environment=environment())
    results.add(f"training-{DEVICE.type}", **record)
    CLOCK.show(benchmark, [t / 1e3 for t in times[name]])


@pytest.mark.skipif(not compile_wanted(network=True), reason="SR3FAST_BENCH_COMPILE (on a CPU, 1 asks for it)")
@pytest.mark.benchmark(timer=CLOCK)
def test_training_against_torch_compile(benchmark, results):
    check_gradient(low=True)
    theirs, fastest = f"torch.compile {LOW}", NAMES[-1]
    times = interleave({name: step_of(name) for name in (theirs, fastest)}, seconds=40, rounds=(5, 15))
    ms = {k: statistics.median(v) for k, v in times.items()}
    record = {
        **{"implementation": theirs, "batch": BATCH, "size": SIZE, "ms_a_step": ms[theirs]},
        **{"sr3fast": fastest, "sr3fast_ms_a_step": ms[fastest], "x torch.compile": ms[theirs] / ms[fastest]},
    }
    benchmark.extra_info.update(record, environment=environment())
    results.add(f"training-compile-{DEVICE.type}", **record)
    CLOCK.show(benchmark, [t / 1e3 for t in times[theirs]])
