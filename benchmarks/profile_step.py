"""Where the time of a sampling step goes: the engine's 97.8 M network, batch 1, 128 x 128, by kind of kernel.

python benchmarks/profile_step.py            writes OUT/profile-<device>.json (benchmarks/results)
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import islice
from typing import Any

import torch
from conftest import RESULTS
from sampling import network, ours
from torch.profiler import ProfilerActivity, profile, record_function

from sr3fast import ops
from sr3fast.native import CppHome

STEPS = 10
KINDS = {  # the first pattern that a kernel's name meets
    "norms": r"group_norm_silu|norm_|cluster_kernel|grid_kernel|moments_kernel|apply_kernel",
    "refinement step": r"sr3fast::(solver_step|refine)|step_kernel",
    "attention": r"scaled_dot_product|attention|flash|bmm|softmax",
    "convolutions": r"conv|mkldnn|onednn|cudnn|xmma|cutlass|gemm|nvjet|linear|addmm|::mm",
    "copies and sums": r"copy|add|sum_kernel|cat|upsample|clone|to_copy|elementwise",
}


def kind(name: str) -> str:
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "the rest")


def name(where: Any, function: str) -> None:
    """Have the profiler, which looks into the dispatcher, see what goes past it."""
    real = getattr(where, function)

    def named(*args, **options):
        with record_function(f"sr3fast::{function}"):
            return real(*args, **options)

    setattr(where, function, named)


def main() -> None:
    name(ops, "solver_step")
    name(CppHome, "conv3x3")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    unet, x = network(device), torch.rand(1, 3, 128, 128, device=device) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        steps = ours(unet, x, dtype)
        for _ in islice(steps, 3):
            pass
        with profile(activities=activities) as profiler:
            for _ in islice(steps, STEPS):
                pass
        ms: dict[str, float] = defaultdict(float)
        for event in profiler.key_averages():
            time = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            ms[kind(event.key)] += time / 1e3 / STEPS
        whole = sum(ms.values())
        for kernels, t in sorted(ms.items(), key=lambda item: -item[1]):
            share = {"kernels": kernels, "ms_a_step": t, "% of the step": 100 * t / whole}
            RESULTS.add(f"profile-{device}", dtype=str(dtype).removeprefix("torch."), **share)
            print(f"{dtype}  {kernels:20}{t:8.2f} ms {100 * t / whole:6.1f} %")


if __name__ == "__main__":
    main()
