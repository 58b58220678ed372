"""What each transformation of the engine gives: a step of the 97.8 M network, rung by rung.

python benchmarks/ladder.py [--batch 1] [--size 128] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from environment import environment
from sampling import Plain, interleaved, network, ours, textbook
from torch import Tensor

from sr3fast.engine import Engine, Form

RUNGS = [field.name for field in dataclasses.fields(Form)]


def rungs(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Form]]:
    """The forms from none to all, each with one transformation more; those that do not apply are left out."""
    form = Form.none()
    yield "none", form
    for name in RUNGS:
        longer = dataclasses.replace(form, **{name: True})
        if longer.on(device, dtype) != form.on(device, dtype):
            yield name, longer
        form = longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    unet = network(device.type)
    x = torch.rand(options.batch, 3, options.size, options.size, device=device) * 2 - 1

    runs: dict[str, Iterator[Tensor]] = {"eager float32": textbook(Plain(unet), x)}
    for name, form in rungs(device, dtype):
        label = f"engine, {options.dtype}" if name == "none" else f"+ {name}"
        runs[label] = ours(Engine(unet, dtype, form, graph=False), x, dtype)
    if device.type == "cuda":
        runs["+ graph"] = ours(Engine(unet, dtype), x, dtype)
    times = interleaved(runs, options.rounds, 10 if device.type == "cuda" else 1)
    seconds = {label: statistics.median(t) for label, t in times.items()}

    eager = next(iter(seconds.values()))
    before = eager
    print(f"a step, batch {options.batch}, {options.size} x {options.size}, {environment()['device']}")
    print(f"{'':24}{'ms':>9}{'this rung':>12}{'in all':>9}")
    for label, t in seconds.items():
        print(f"{label:24}{t * 1e3:9.2f}{before / t:11.2f}x{eager / t:8.2f}x")
        before = t
    if options.json:
        shape = {"batch": options.batch, "size": options.size}
        rows = [{"rung": k, "ms_a_step": t * 1e3, "times_faster": eager / t, **shape} for k, t in seconds.items()]
        figures = {"environment": environment(), "results": rows}
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
