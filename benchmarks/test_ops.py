"""Every op and home against eager torch and torch.compile, with the copy rate of the same size in the same turn.

`% of copy` counts the bytes that the op must move at least; `x eager` is eager's time over ours. A home that does
not agree with the reference is not timed: the benchmark fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLOCK, DEVICE, L2_BYTES, assert_as_exact, assert_bits, compile_wanted, interleave

from sr3fast import backend, ops
from sr3fast.reference import refine_row
from sr3fast.schedule import Schedule
from sr3fast.solver import rows

pytestmark = pytest.mark.benchmark(timer=CLOCK)

GPU = DEVICE.type == "cuda"
HOMES = [h for h in backend.HOMES[DEVICE.type] if not isinstance(backend.load(h), str)]
SCHEDULE = Schedule.named("linear", T=2000)
ALPHA, GAMMA = SCHEDULE.alpha[1000].item(), SCHEDULE.gamma[1000].item()
ROW = rows(SCHEDULE, solver="dpm++2m", steps=25).rows[12]
NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last

Inputs = dict[str, Any]


@dataclass
class Case:
    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = NCHW
    does: str = ""  # forward, backward, forward+backward
    groups: int = 32
    options: Inputs = field(default_factory=dict)

    @property
    def name(self) -> str:
        layout = "channels_last" if self.layout == CHANNELS_LAST else "NCHW"
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.op, "x".join(map(str, self.shape)), dtype, layout, *([self.does] if self.does else [])])

    def describe(self) -> Inputs:
        return {
            "op": f"{self.op} {self.does}".strip(),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": "channels_last" if self.layout == CHANNELS_LAST else "NCHW",
        }

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def passes(self) -> float:
        """How often the op reads or writes a tensor of its size, at least."""
        if self.op.endswith("group_norm_silu"):
            forward = {"group_norm_silu": 2, "add_group_norm_silu": 4}[self.op]
            return {"forward": forward, "backward": 3, "forward+backward": forward + 3}[self.does]
        return {"noise": 1, "refine": 3, "solver_step": 5, "q_sample": 3}[self.op]

    def tensor(self, seed: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        t = torch.randn(self.shape, generator=generator, device=DEVICE) * std + mean
        return t.to(self.dtype).contiguous(memory_format=self.layout)

    def inputs(self, seed: int = 0) -> Inputs:
        new, b, c = self.tensor, self.shape[0], self.shape[1]
        if self.op == "noise":
            return {}
        if self.op == "refine":
            return {"y": new(seed), "f": new(seed + 1), "out": torch.empty_like(new(seed))}
        if self.op == "solver_step":
            y = new(seed)
            outs = {"out": torch.empty_like(y), "m": torch.empty_like(y)}
            return {"y": y, "f": new(seed + 1), "m1": new(seed + 2, 0.5), **outs}
        if self.op == "q_sample":
            y = new(seed, 0.5)
            gamma = torch.linspace(0.1, 0.9, b, dtype=torch.float64, device=DEVICE)
            return {"y": y, "gamma": gamma, "out": torch.empty_like(y), "eps": torch.empty_like(y)}
        parameters = torch.randn(2, c, generator=torch.Generator().manual_seed(seed)).to(DEVICE, self.dtype)
        given = {"h": new(seed, 1.5, 0.3), "weight": 1 + 0.3 * parameters[0], "bias": parameters[1].clone()}
        if self.op == "add_group_norm_silu":
            given["residual"] = new(seed + 1)
        if self.does != "forward":
            given = {k: t.requires_grad_() for k, t in given.items()}
            given["grad"] = new(seed + 2)
        return given

    # ------------------------------------------------------------------------------ what is compared

    def ours(self, t: Inputs) -> Any:
        if self.op == "noise":
            return ops.noise(self.shape, 3, step=7, device=DEVICE)
        if self.op == "refine":
            return ops.refine(t["y"], t["f"], ALPHA, GAMMA, 3, 1000, out=t["out"])
        if self.op == "solver_step":
            return ops.solver_step(t["y"], t["f"], ROW, 3, 13, history=(t["m1"],), out=(t["out"], t["m"]))
        if self.op == "q_sample":
            return ops.q_sample(t["y"], t["gamma"], 3, 7, out=(t["out"], t["eps"]))
        return self.norm(t)

    def norm(self, t: Inputs) -> Any:
        if self.op == "group_norm_silu":
            return ops.group_norm_silu(t["h"], t["weight"], t["bias"], self.groups)
        return ops.add_group_norm_silu(t["h"], t["residual"], t["weight"], t["bias"], self.groups)

    def eager(self, t: Inputs) -> Any:
        """As people write it."""
        if self.op == "noise":
            return torch.randn(self.shape, device=DEVICE)
        if self.op == "refine":
            z = torch.randn_like(t["y"])
            mean = (t["y"] - (1 - ALPHA) / math.sqrt(1 - GAMMA) * t["f"]) / math.sqrt(ALPHA)
            return mean + math.sqrt(1 - ALPHA) * z
        if self.op == "solver_step":
            recip, ratio, clip, a, b, c0, c1, _, _ = ROW_VALUES
            m = (recip * t["y"] - ratio * t["f"]).clamp(-clip, clip)
            return a * t["y"] + b * t["f"] + c0 * m + c1 * t["m1"], m
        if self.op == "q_sample":
            gamma = t["gamma"].to(self.dtype).view(-1, 1, 1, 1)
            eps = torch.randn_like(t["y"])
            return gamma.sqrt() * t["y"] + (1 - gamma).sqrt() * eps, eps
        if self.op == "group_norm_silu":
            return F.silu(F.group_norm(t["h"], self.groups, t["weight"], t["bias"]))
        s = t["h"] + t["residual"]
        return F.silu(F.group_norm(s, self.groups, t["weight"], t["bias"])), s

    def leaves(self, t: Inputs) -> list[torch.Tensor]:
        return [v for k, v in t.items() if k != "grad"]

    def mode(self) -> contextlib.AbstractContextManager[Any]:
        """Inference, but for what has a backward pass: as a loop around the calls has it."""
        return torch.set_grad_enabled("backward" in self.does)

    def runner(self, f: Callable[[Inputs], Any], sets: list[Inputs]) -> Callable[[int], Any]:
        """f over the rotating inputs, in the part (forward, backward, both) that is measured."""

        def first(out: Any) -> torch.Tensor:
            return out[0] if isinstance(out, tuple) else out

        if self.does == "backward":
            outs = [first(f(t)) for t in sets]

            def run(i: int) -> Any:
                t = sets[i % len(sets)]
                return torch.autograd.grad(outs[i % len(sets)], self.leaves(t), t["grad"], retain_graph=True)

        elif self.does == "forward+backward":

            def run(i: int) -> Any:
                t = sets[i % len(sets)]
                return torch.autograd.grad(first(f(t)), self.leaves(t), t["grad"])

        else:

            def run(i: int) -> Any:
                return f(sets[i % len(sets)])

        return run

    # ------------------------------------------------------------------------------ agreement

    def check(self, home: str) -> None:
        """The home agrees with the reference on this very input."""
        t = self.inputs()
        if self.op.endswith("group_norm_silu"):
            with backend.use(home):
                self._check_norm(home, t)
            return
        with torch.no_grad(), backend.use("torch"):
            expected = self.ours(t)
            expected = [e.clone() for e in (expected if isinstance(expected, tuple) else (expected,))]
        with torch.no_grad(), backend.use(home):
            actual = self.ours(t)
        for a, e in zip(actual if isinstance(actual, tuple) else (actual,), expected, strict=True):
            assert_bits(f"{self.op} of {home}", a, e)

    def _check_norm(self, home: str, t: Inputs) -> None:
        exact_t = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
        part = "forward+backward" if self.does != "forward" else "forward"
        case = Case(self.op, self.shape, self.dtype, self.layout, part, self.groups)
        got = case.runner(case.norm, [t])(0)
        plain, exact = case.runner(case.eager, [t])(0), case.runner(case.eager, [exact_t])(0)
        got, plain, exact = (r if isinstance(r, tuple) else (r,) for r in (got, plain, exact))
        for a, p, e in zip(got, plain, exact, strict=True):
            assert_as_exact(f"{self.op} of {home}", a, p, e)


ROW_VALUES = ROW.tolist()
assert ROW_VALUES[6] != 0 and ROW_VALUES[7:] == [0.0, 0.0], "a row of dpm++2m reads one estimate and draws nothing"
assert refine_row(torch.tensor(ALPHA), torch.tensor(GAMMA), torch.tensor(2)).shape == (9,)

NORMS = ("forward", "backward", "forward+backward")
STEPS = [
    Case("noise", (8, 3, 128, 128)),
    Case("refine", (8, 3, 128, 128)),
    Case("refine", (1, 3, 128, 128)),
    Case("refine", (8, 3, 128, 128), layout=CHANNELS_LAST),
    Case("solver_step", (8, 3, 128, 128)),
    Case("q_sample", (8, 3, 128, 128)),
]
if GPU:  # 256 MB and more
    STEPS += [
        Case("noise", (96, 3, 512, 512)),
        Case("refine", (96, 3, 512, 512)),
        Case("refine", (96, 3, 512, 512), layout=CHANNELS_LAST),
        Case("solver_step", (96, 3, 512, 512)),
        Case("q_sample", (96, 3, 512, 512)),
    ]
    CASES = [
        *STEPS,
        *(Case("group_norm_silu", (64, 128, 128, 128), torch.bfloat16, CHANNELS_LAST, d) for d in NORMS[:2]),
        *(Case("group_norm_silu", (64, 128, 128, 128), torch.bfloat16, NCHW, d) for d in NORMS[:2]),
        *(Case("group_norm_silu", (32, 128, 128, 128), torch.float32, CHANNELS_LAST, d) for d in NORMS[:2]),
        *(Case("group_norm_silu", (1, 512, 16, 16), torch.bfloat16, CHANNELS_LAST, d) for d in NORMS[:2]),
        *(Case("add_group_norm_silu", (64, 128, 128, 128), torch.bfloat16, CHANNELS_LAST, d) for d in NORMS[:1]),
    ]
else:
    CASES = [
        *STEPS,
        *(
            Case("group_norm_silu", (8, 64, 128, 128), torch.float32, layout, d)
            for layout in (NCHW, CHANNELS_LAST)
            for d in (NORMS[0], NORMS[2])
        ),
        Case("group_norm_silu", (8, 64, 128, 128), torch.bfloat16, CHANNELS_LAST, "forward"),
        Case("add_group_norm_silu", (8, 64, 128, 128), torch.float32, CHANNELS_LAST, "forward"),
    ]


def input_sets(case: Case) -> list[Inputs]:
    """Enough sets of inputs that on a GPU none is found in the L2 cache."""
    n = 1 if not GPU else min(64, 1 + L2_BYTES // int(case.size * case.passes))
    return [case.inputs(10 * i) for i in range(n)]


def copy_of(case: Case) -> Callable[[int], Any]:
    n = 1 if not GPU else min(64, 1 + L2_BYTES // (2 * case.size))
    pairs = [(case.tensor(i), torch.empty_like(case.tensor(i))) for i in range(n)]
    return lambda i: pairs[i % n][1].copy_(pairs[i % n][0])


def times_of(case: Case, home: str) -> dict[str, list[float]]:
    """A copy, eager and the home in turn. The home is forced once for all of them: only ours asks for it."""
    sets = input_sets(case)
    with backend.use(home), case.mode():
        contestants = {
            "copy": copy_of(case),
            "eager": case.runner(case.eager, sets),
            home: case.runner(case.ours, sets),
        }
        return interleave(contestants)


def report(benchmark: Any, results: Any, case: Case, home: str, times: dict[str, list[float]], **about: Any) -> None:
    ms = {name: statistics.median(values) for name, values in times.items()}
    rate = {name: case.size * (2 if name == "copy" else case.passes) / ms[name] / 1e6 for name in ms}
    record = {
        **case.describe(),
        **about,
        "home": home,
        "ms": ms[home],
        "GB/s": rate[home],
        "% of copy": 100 * rate[home] / rate["copy"],
        "x eager": ms["eager"] / ms[home],
        "eager ms": ms["eager"],
        "copy GB/s": rate["copy"],
    }
    benchmark.extra_info.update(record)
    results.add(f"ops-{DEVICE.type}", **record)
    CLOCK.show(benchmark, [t / 1e3 for t in times[home]])


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_op(benchmark, results, case, home):
    case.check(home)
    report(benchmark, results, case, home, times_of(case, home))


MALLOC = ("as it comes", "kept")


def keep_pages() -> None:
    """malloc returns no page to the system and maps none anew, so eager's time is no longer page faults."""
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4
    settings = ((trim_threshold, 2**31 - 1), (top_pad, 256 << 20), (mmap_threshold, 32 << 20), (mmap_max, 0))
    assert all(libc.mallopt(*setting) == 1 for setting in settings)


@pytest.mark.skipif(GPU or not sys.platform.startswith("linux"), reason="of glibc's malloc")
@pytest.mark.parametrize("malloc", MALLOC)
@pytest.mark.parametrize("case", [c for c in STEPS if c.op in ("refine", "q_sample")], ids=lambda c: c.name)
def test_fresh_process(benchmark, results, case, malloc):
    """How often malloc returns pages to the system depends on what a process did before: here, nothing."""
    case.check(HOMES[0])
    command = [sys.executable, __file__, case.name, malloc]
    times = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    report(benchmark, results, case, HOMES[0], times, malloc=malloc)


@pytest.mark.skipif(not compile_wanted(), reason="no compiler, or SR3FAST_BENCH_COMPILE=0")
@pytest.mark.parametrize("case", [c for c in CASES if c.does != "backward"], ids=lambda c: c.name)
def test_against_torch_compile(benchmark, results, case):
    """The eager formula compiled, against the best home."""
    home = HOMES[0]
    case.check(home)
    sets = input_sets(case)
    torch._dynamo.reset()
    compiled = torch.compile(case.eager, fullgraph=True)
    with case.mode():
        times = interleave({"compile": case.runner(compiled, sets), home: case.runner(case.ours, sets)})
    ms = {name: statistics.median(values) for name, values in times.items()}
    record = {
        **case.describe(),
        "home": home,
        "ms": ms[home],
        "x torch.compile": ms["compile"] / ms[home],
        "torch.compile ms": ms["compile"],
    }
    benchmark.extra_info.update(record)
    results.add(f"ops-compile-{DEVICE.type}", **record)
    CLOCK.show(benchmark, [t / 1e3 for t in times[home]])


if __name__ == "__main__":  # one case in a process of its own: name, malloc
    (chosen,) = (c for c in CASES if c.name == sys.argv[1])
    if sys.argv[2] == "kept":
        keep_pages()
    print(json.dumps(times_of(chosen, HOMES[0])))
