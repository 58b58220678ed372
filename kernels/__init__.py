"""The ops in Triton: for GPUs without the compiled module, for ROCm, and, interpreted, for tests on a CPU.

Installed as `sr3fast.kernels`; loaded by name from sr3fast/backend.py, which sends f(outs, *inputs) here with
arguments that sr3fast/ops.py has checked; `conv` and `attention` are called by sr3fast/engine, on GPUs only.
Imports torch and triton only.
"""

from __future__ import annotations

import torch
import triton

from . import attention, conv
from .group_norm_silu import add_group_norm_silu, group_norm_silu, group_norm_silu_backward
from .noise import noise
from .pixels import INTERPRETED
from .q_sample import q_sample
from .step import refine, solver_step

__all__ = [
    "add_group_norm_silu",
    "attention",
    "conv",
    "description",
    "group_norm_silu",
    "group_norm_silu_backward",
    "noise",
    "q_sample",
    "refine",
    "refusal",
    "solver_step",
]


def refusal() -> str | None:
    """Why this home cannot run here, or None."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "Triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter on the CPU"


def description() -> str:
    return f"triton {triton.__version__}" + (", interpreted" if INTERPRETED else "")
