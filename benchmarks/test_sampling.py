"""A sampling step of the 97.8 M network against others' and PyTorch's own: pytest benchmarks -k sampling.

Every implementation is timed in turn in each round, so the ratios come from one machine in one state. What
does not agree with the plain float32 network is not timed. The times of whole images are steps times the
step's time: extrapolated, since every step does the same work.
"""

from __future__ import annotations

import gc
import statistics

import pytest
import torch
from conftest import CLOCK, compile_wanted
from environment import environment
from sampling import (
    Plain,
    check_agreement,
    in_bfloat16,
    interleaved,
    low_precision,
    network,
    ours,
    peak_memory,
    textbook,
    variants,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(1, 128), (8, 128), (64, 128), (1, 512)] if CUDA else [(1, 128)]
NAMES = [
    "eager float32",
    "eager bfloat16, channels_last",
    "diffusers float32",
    "diffusers bfloat16",
    "sr3fast float32",
    "sr3fast bfloat16",
]


class Measured:
    """One shape: every implementation's run, median seconds a step, peak memory."""

    def __init__(self, batch: int, size: int):
        unet = network(DEVICE)
        x = torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
        self.errors = check_agreement(unet, x[:1])
        self.runs, self.memory = {}, {}
        for name, start in variants(unet, x).items():
            self.runs[name] = start()
            self.memory[name] = peak_memory(lambda name=name: next(self.runs[name]))
        self.times = interleaved(self.runs, rounds=9, steps=10 if CUDA else 1)
        self.seconds = {name: statistics.median(t) for name, t in self.times.items()}
        self.runs.clear()


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"batch {shape[0]}, {shape[1]}^2")
def measured(request):
    result = Measured(*request.param)
    result.batch, result.size = request.param
    gc.collect()
    yield result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
def test_sampling(benchmark, measured, results, name):
    if name not in measured.times:
        pytest.skip("diffusers is not installed")
    seconds, eager = measured.seconds[name], measured.seconds["eager float32"]
    benchmark.group = f"a sampling step, batch {measured.batch}, {measured.size} x {measured.size}"
    benchmark.extra_info.update(
        batch=measured.batch,
        size=measured.size,
        device=DEVICE,
        environment=environment(),
        times_faster_than_eager=eager / seconds,
        seconds_per_image={steps: seconds * steps / measured.batch for steps in (2000, 100, 25)},
        images_per_second={steps: measured.batch / (seconds * steps) for steps in (2000, 100, 25)},
        peak_memory_bytes=measured.memory[name],
        relative_error=measured.errors.get(name.removeprefix("sr3fast ")) if "sr3fast" in name else None,
    )
    results.add(
        f"sampling-{DEVICE}",
        implementation=name,
        batch=measured.batch,
        size=measured.size,
        ms_a_step=seconds * 1e3,
        times_faster=eager / seconds,
        **{f"s_an_image_at_{n}_steps": seconds * n / measured.batch for n in (2000, 100, 25)},
        **({"peak_GB": memory / 1e9} if (memory := measured.memory[name]) is not None else {}),
    )
    CLOCK.show(benchmark, measured.times[name])


@pytest.mark.skipif(not compile_wanted(network=True), reason="SR3FAST_BENCH_COMPILE (on a CPU, 1 asks for it)")
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("mode", ("default", "max-autotune") if CUDA else ("default",))
def test_sampling_against_torch_compile(benchmark, results, mode):
    """The network compiled, bfloat16 and channels_last; each mode in a run of its own: they take minutes to compile."""
    batch, size = 8 if CUDA else 1, 128
    unet, x = network(DEVICE), torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
    check_agreement(unet, x[:1])
    torch._dynamo.reset()
    compiled = torch.compile(low_precision(unet), mode=mode, fullgraph=True)
    name = f"torch.compile {mode}, bfloat16"
    runs = {
        "eager float32": textbook(Plain(unet), x),
        name: textbook(in_bfloat16(compiled), x),
        "sr3fast bfloat16": ours(unet, x, torch.bfloat16),
    }
    times = interleaved(runs, rounds=9, steps=10 if CUDA else 1)
    ms = {k: 1e3 * statistics.median(t) for k, t in times.items()}
    record = {
        **{"implementation": name, "batch": batch, "size": size, "ms_a_step": ms[name]},
        "times_faster": ms["eager float32"] / ms[name],
        "sr3fast_ms_a_step": ms["sr3fast bfloat16"],
        "x torch.compile": ms[name] / ms["sr3fast bfloat16"],
    }
    benchmark.extra_info.update(record, environment=environment())
    results.add(f"sampling-compile-{DEVICE}", **record)
    CLOCK.show(benchmark, times[name])
