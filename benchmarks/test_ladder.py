"""What each transformation of the engine gives: a step of the 97.8 M network, rung by rung."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

import pytest
import torch
from conftest import CLOCK, DEVICE
from sampling import Plain, interleaved, network, ours, textbook

from sr3fast.engine import Engine, Form

GPU = DEVICE.type == "cuda"
FILES = {torch.bfloat16: f"ladder-{DEVICE.type}", torch.float32: f"ladder-float32-{DEVICE.type}"}


def rungs(dtype: torch.dtype) -> Iterator[tuple[str, Form]]:
    """The forms from none to all, each with one transformation more; those that do not apply are left out."""
    form = Form.none()
    yield "none", form
    for field in dataclasses.fields(Form)[:-1]:  # the last, `tuned`, comes after the graph
        longer = dataclasses.replace(form, **{field.name: True})
        if longer.on(DEVICE, dtype) != form.on(DEVICE, dtype):
            yield field.name, longer
        form = longer


def ratio(before: list[float], after: list[float]) -> float:
    """The median over the turns: in each, both saw the same machine."""
    return statistics.median(b / a for b, a in zip(before, after, strict=True))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("batch", (1, 8) if GPU else (1,))
@pytest.mark.parametrize("dtype", FILES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_ladder(benchmark, results, dtype, batch):
    unet = network(DEVICE.type)
    x = torch.rand(batch, 3, 128, 128, device=DEVICE) * 2 - 1
    runs = {"eager float32": textbook(Plain(unet), x)}
    for name, form in rungs(dtype):
        label = f"engine, {str(dtype).removeprefix('torch.')}" if name == "none" else f"+ {name}"
        runs[label] = ours(Engine(unet, dtype, form, graph=False), x)
    if GPU:
        runs["+ graph"] = ours(Engine(unet, dtype, dataclasses.replace(Form(), tuned=False)), x)
        runs["+ tuned"] = ours(Engine(unet, dtype), x)
    times = interleaved(runs, 11, 10 if GPU else 1)
    ms = {label: 1e3 * statistics.median(t) for label, t in times.items()}
    before = eager = times["eager float32"]
    for label, t in times.items():
        shape = {"batch": batch, "size": 128, "ms_a_step": ms[label]}
        results.add(FILES[dtype], rung=label, **shape, this_rung=ratio(before, t), in_all=ratio(eager, t))
        before = t
    CLOCK.show(benchmark, list(times.values())[-1])
