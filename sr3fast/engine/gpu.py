"""What a GPU has: Triton's kernels, multiprocessors, the time of a call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend


def kernels(device: torch.device) -> Any:
    """The Triton kernels where they run on tensors of the device; None else."""
    if device.type != "cuda" or backend.forced() not in (None, "triton"):
        return None
    module = backend.load("triton")
    return None if isinstance(module, str) or not compiles(device) else module


@functools.cache
def compiles(device: torch.device) -> bool:
    """Whether Triton can: it needs the machine's C compiler, a folder to write to, a GPU that is not too old."""
    one = torch.ones(1, 8, 1, 1, device=device)
    try:
        backend.load("triton").conv.add(one, one.view(8), None)
    except Exception as error:
        warnings.warn(
            f"the engine goes without its Triton kernels, which cannot be compiled here: {error}", stacklevel=2
        )
        return False
    return True


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def time_of(device: torch.device, calls: Sequence[Callable[[], Tensor]]) -> float:
    """ms of the calls, one after the other on the GPU: the least of some turns."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    for call in calls:
        call()
    turns = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(40):  # empties the cache, and has the GPU busy until all calls are launched
            flush.zero_()
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        turns.append(begin.elapsed_time(end))
    return min(turns)
