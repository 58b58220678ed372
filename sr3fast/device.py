"""The device to work on, and what it is fast in."""

from __future__ import annotations

import torch


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name, by default the GPU if there is one. ValueError where it is not there."""
    try:
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(f"device {name} is not there ({' '.join(str(error).split())}): use cpu") from error
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it and on a CPU with matrix units, float32 elsewhere: there it is the faster."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # of other versions of torch we know nothing
        fast = device.type == "cpu" and torch.backends.mkldnn.is_available()
        fast = fast and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return torch.bfloat16 if fast else torch.float32
