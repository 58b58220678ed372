"""Which implementation runs: one small table, op -> device -> homes, best first.

`SR3FAST_BACKEND=torch|cpp|cuda|triton`, or `with backend.use("cpp")`, forces one home; a forced one that is
missing or cannot do the work raises and says why. `sr3fast info` prints the table.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .device import fast_dtype, find_device

OPS = (
    "noise",
    "refine",
    "solver_step",
    "q_sample",
    "group_norm_silu",
    "add_group_norm_silu",
    "group_norm_silu_backward",
)
HOMES = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}  # device -> homes, best first
MODULES = {  # a module, or a function that gives its like
    "torch": "sr3fast.reference",
    "cpp": "sr3fast.native:cpp",
    "cuda": "sr3fast.native:cuda",
    "triton": "sr3fast.kernels",
}

# the environment is asked once, at import: asking takes as long as a small call's checks
_forced: ContextVar[str | None] = ContextVar("sr3fast_backend", default=os.environ.get("SR3FAST_BACKEND") or None)


@contextlib.contextmanager
def use(home: str) -> Iterator[None]:
    """Force one home ("torch", "cpp", "cuda" or "triton") for the ops called inside."""
    _check_home(home)
    token = _forced.set(home)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The home that is forced here, if one is."""
    return _forced.get()


def _check_home(home: str) -> str:
    if home not in MODULES:
        raise ValueError(f"the backend must be one of {', '.join(MODULES)}: got {home!r}")
    return home


@functools.cache
def load(home: str) -> Any:
    """The module of a home, or the reason (a str) why it is not there."""
    name, _, function = MODULES[home].partition(":")
    try:
        module = importlib.import_module(name)
        if function:
            module = getattr(module, function)()
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    refusal = getattr(module, "refusal", lambda: None)()
    return refusal if refusal is not None else module


Implementation = Callable[..., None]


def find(op: str, device: torch.device) -> Implementation:
    """The best implementation of `op` for tensors on `device`: f(outs, *inputs) fills the tensors of outs.

    Raises:
        RuntimeError: the forced home is missing or does not run on this device.
    """
    return _find(op, device, _forced.get())


@functools.cache
def _find(op: str, device: torch.device, forced: str | None) -> Implementation:
    if forced is not None:
        home = _check_home(forced)
        if not _runs_on(home, device.type):
            raise RuntimeError(f"backend {home!r} was asked for, but it does not run on {device} tensors")
        module = load(home)
        if isinstance(module, str):
            raise RuntimeError(f"backend {home!r} was asked for, but it is not available: {module}")
        return _implementation(module, home, op)
    for home in HOMES.get(device.type, ("torch",)):
        module = load(home)
        if not isinstance(module, str):
            return _implementation(module, home, op)
    raise AssertionError("plain torch is always there")


def _runs_on(home: str, device: str) -> bool:
    if home == "triton" and device == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return home == "torch" or home in HOMES.get(device, ())


def _implementation(module: Any, home: str, op: str) -> Implementation:
    function = getattr(module, op)
    if home != "torch":
        return function

    # the reference returns its results; the contract is to fill
    def fill(outs: tuple[Tensor | None, ...], *inputs) -> None:
        if op == "noise":  # the others read shape and device off their inputs
            inputs = (tuple(outs[0].shape), *inputs, outs[0].device)  # type: ignore[union-attr]
        results = function(*inputs)
        if op in ("refine", "solver_step", "q_sample"):
            results = (*results, results[0])  # into= receives a copy
        for out, result in zip(outs, results, strict=True):
            if out is not None and result is not out:
                out.copy_(result)

    return fill


def info() -> str:
    """What is built, what runs, and why anything was refused, as text."""
    lines = [f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}"]
    if _forced.get():
        lines.append(f"forced: {_forced.get()}")
    for home in MODULES:
        module = load(home)
        if isinstance(module, str):
            lines.append(f"{home:7} no   {module}")
        else:
            lines.append(f"{home:7} yes  {getattr(module, 'description', lambda: '')()}".rstrip())
    lines.append("")
    lines.append(f"{'op':26}" + "".join(f"{device:9}" for device in HOMES))
    for op in OPS:
        best = [
            next(h for h in homes if not isinstance(load(h), str) and hasattr(load(h), op)) for homes in HOMES.values()
        ]
        lines.append(f"{op:26}" + "".join(f"{home:9}" for home in best))
    device = find_device()
    fast = str(fast_dtype(device)).removeprefix("torch.")
    lines.append(f"\npictures are upscaled on {device}, in {fast} where nothing else is asked for")
    return "\n".join(lines)
