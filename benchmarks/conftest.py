"""Measuring: alternation, medians, agreement, and the table and JSON file that come out of it.

    pytest benchmarks/ --benchmark-only            OUT=folder for the JSON (benchmarks/results)
                                                   SR3FAST_BENCH_COMPILE=0 leaves torch.compile out

Shared machines drift, so the contestants run in turn, one call each a round, and a figure is a median. On a GPU a
call is timed by CUDA events and the inputs rotate past the L2 cache.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
L2_BYTES = 128 << 20  # more than twice the L2 of an H200


def compile_wanted(network: bool = False) -> bool:
    """torch.compile is measured where a compiler is, unless SR3FAST_BENCH_COMPILE says otherwise; on a CPU, where it
    takes minutes to make a network slower, a whole network's only where that asks for it."""
    compiler = DEVICE.type == "cuda" or (not network and (shutil.which("c++") or shutil.which("g++")))
    return os.environ.get("SR3FAST_BENCH_COMPILE", "1" if compiler else "0") == "1"


class Timer:
    """Milliseconds of one call: on a GPU of its kernels, which wait until the host has queued them all."""

    AHEAD = 1_000_000  # cycles, half a millisecond, that the GPU idles while the host queues a call

    def __init__(self, device: torch.device = DEVICE):
        self.cuda = device.type == "cuda"

    def __call__(self, f: Callable[[], Any]) -> float:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.AHEAD)
            start.record()
            f()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begin = time.perf_counter()
        f()
        return (time.perf_counter() - begin) * 1e3


def interleave(
    contestants: dict[str, Callable[[int], Any]],
    *,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (7, 100 if DEVICE.type == "cuda" else 500),
) -> dict[str, list[float]]:
    """Milliseconds of each contestant, f(round), call by call; they run in turn.

    Args:
        contestants: f(i) is one call; i rotates the inputs.
        seconds: about how long the whole takes; `rounds` bounds the number of turns.
    """
    timer = Timer()
    for f in contestants.values():
        f(0)
    turn = sum(timer(lambda f=f: f(1)) for f in contestants.values()) / 1e3
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(max(rounds[0], min(rounds[1], int(seconds / turn)))):
        for name, f in contestants.items():
            times[name].append(timer(lambda f=f, i=i: f(i)))
    return times


class Clock:
    """pytest-benchmark's timer: it reads out seconds that were measured in turn with the others'."""

    def __init__(self) -> None:
        self.now, self.ticks = 0.0, iter(())

    def show(self, benchmark: Any, seconds: list[float]) -> None:
        self.ticks = iter([tick for t in seconds for tick in (0.0, t)])
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    def __call__(self) -> float:
        self.now += next(self.ticks, 0.0)
        return self.now


CLOCK = Clock()  # for pytest.mark.benchmark(timer=CLOCK)


def assert_bits(name: str, actual: torch.Tensor, reference: torch.Tensor) -> None:
    if not torch.equal(actual, reference):
        raise AssertionError(f"{name} does not have the reference's bits: it is not timed")


def assert_as_exact(name: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The error against float64 is at most twice plain torch's in the same dtype, plus an ulp of the largest value."""
    error, allowed = ((t.double() - exact).abs().max().item() for t in (actual, plain))
    limit = 2 * allowed + torch.finfo(plain.dtype).eps * exact.abs().max().item()
    if not error <= limit:
        raise AssertionError(f"{name} is off by {error:.3g}, more than {limit:.3g}: it is not timed")


class Results:
    """What was measured: a list of records for each file `<folder>/<name>.json`, written anew with each record, so that
    a run that is cut short leaves what it had."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[dict[str, Any]]] = {}
        self.environment = environment()

    def add(self, name: str, **record: Any) -> None:
        records = self.files.setdefault(name, [])
        records.append(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".tmp", delete=False) as file:
            file.write(json.dumps({"environment": self.environment, "results": records}, indent=1) + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.path(name))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


RESULTS = Results(Path(os.environ.get("OUT", "benchmarks/results")))


@pytest.fixture(scope="session")
def results() -> Results:
    """Add records here; they are written, and printed at the end."""
    return RESULTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not RESULTS.files:
        return
    from tables import text_table

    for name, records in RESULTS.files.items():
        terminalreporter.section(name)
        terminalreporter.write_line(text_table(records))
        terminalreporter.write_line(f"written to {RESULTS.path(name)}")
