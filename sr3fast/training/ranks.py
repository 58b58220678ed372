"""One process of several, and the signals that end a run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # early: its defaults keep for ever the process group that they find at import

from ..device import find_device

SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
# what ends a run: Ctrl-C, a cluster, a terminal that is closed
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, SIGHUP) if number is not None]


@dataclass
class Ranks:
    """This process among those of torchrun; alone without it."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    world: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", 1)))
    local: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", 0)))

    def device(self, name: str) -> torch.device:
        """This rank's of that name; auto: cuda where there is one, else cpu."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = find_device(f"cuda:{self.local}" if name == "cuda" else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def largest(self, number: int, device: torch.device) -> int:
        """Of every rank's number."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """The ranks' way to each other, for a run on that device."""
    ranks = Ranks()
    if ranks.world == 1:
        yield
        return
    backend = "nccl" if ranks.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield
    finally:
        # the trainer goes first: a thread of gloo that outlives the interpreter aborts the process
        gc.collect()
        dist.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection" in text


@contextlib.contextmanager
def between_iterations(world: int) -> Iterator[list[int]]:
    """The list of SIGNALS as they come; at the end the first strikes as it would have. A second one
    strikes at once where this process is alone; to several ranks the launcher sends on what they have already.
    """
    signals: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def note(number: int, frame: object) -> None:
        if not signals and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may have been closed
                os.write(2, b"\nstopping after this iteration, which will be saved\n")
        signals.append(number)
        for other, handler in handlers.items() if world == 1 else ():
            # a terminal that is closed may say so more than once
            signal.signal(other, signal.SIG_IGN if other == SIGHUP else handler)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        signal.raise_signal(signals[0])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """None of SIGNALS: what ends the process has come already."""
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, signal.SIG_IGN) for n in SIGNALS} if here else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def uninterrupted() -> Callable[[int], None]:
    """What a process that loads data does first: signals that the whole group gets are for the one that trains and may
    need another batch. When that one ends, it terminates the others and waits for them.
    """
    ending = multiprocessing.Event()
    atexit.register(ending.set)
    return functools.partial(_ignore_signals, ending)


def _ignore_signals(ending: Any, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)
