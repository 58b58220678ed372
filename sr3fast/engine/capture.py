"""A step as one CUDA graph, whose replays take their place in the schedule from the device."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import ops
from .network import Network, without_autocast
from .tuned import asked_to_be_deterministic, choosing

ROWS = 2048  # least number of levels that a captured graph has room for


class Captures:
    """The CUDA graphs of one engine: they share their memory, so one replays at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.place: Any = None  # device, stream, and pool of the graphs' memory: only one stream's share it
        self.stream: Any = None  # that replayed last

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """The current stream's turn, after that of whichever had it last."""
        with self.lock:
            stream = torch.cuda.current_stream(device)
            if self.stream not in (None, stream):
                stream.wait_stream(self.stream)
            self.stream = stream
            yield

    def capture(self, device: torch.device, body: Callable[[], None], reset: Callable[[], None]) -> Any:
        """A CUDA graph of body(), which reads and writes static tensors only."""
        collecting = gc.isenabled()
        benchmark = torch.backends.cudnn.benchmark
        with self.turn(device), torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            if self.place is None or self.place[0] != device:
                self.place = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            current, (_, stream, pool) = torch.cuda.current_stream(device), self.place
            graph = torch.cuda.CUDAGraph()
            gc.disable()  # a collected kernel would unload its module in the middle of the capture
            by_time = not asked_to_be_deterministic()  # the choice is made in the runs before the capture
            choice = choosing.set(by_time)
            torch.backends.cudnn.benchmark = by_time
            try:
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        reset()
                        body()
                current.wait_stream(stream)
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    body()
            except RuntimeError as error:  # out of memory is one
                self.place = None
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise RuntimeError(
                    f"the step could not be captured as a CUDA graph ({error}); graph=False runs it without"
                ) from error
            finally:
                choosing.reset(choice)
                torch.backends.cudnn.benchmark = benchmark
                if collecting:
                    gc.enable()
            current.wait_stream(stream)
            return graph


class Graph:
    """One shape's captured step: the static tensors that it reads and writes, and its CUDA graphs.

    A replay takes row `counter` of the tables, and moves `counter` and `step` on: the host gives it nothing,
    so another seed, schedule or picture is another content of the same tensors.
    """

    def __init__(self, captures: Captures, network: Network, capacity: int):
        self.captures, self.network, self.capacity = captures, network, capacity
        device, shape = network.device, network.shape
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=device)
        self.table = zeros(capacity, len(network.noise.bias))
        self.rows = zeros(capacity, 9)
        self.table_row, self.row = self.table[:1].clone(), self.rows[:1].clone()
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.ones(1, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.y, self.m, self.m1, self.m2 = (zeros(shape) for _ in range(4))
        self.keep = torch.zeros(1, dtype=torch.bool, device=device)
        self.zero = zeros(1)
        self.eps_hat = torch.zeros_like(network.into, memory_format=torch.preserve_format)
        self.graphs: dict[str, Any] = {}

    def run_network(self) -> None:
        """eps_hat <- f_theta(x, into, levels[counter])"""
        torch.index_select(self.table, 0, self.counter, out=self.table_row)
        self.network.set(self.table_row)
        self.eps_hat.copy_(self.network.forward())

    def run_step(self) -> None:
        """The network and the solver's step of row `counter`; y, the history and `into` move on."""
        torch.index_select(self.table, 0, self.counter, out=self.table_row)
        torch.index_select(self.rows, 0, self.counter, out=self.row)
        self.network.set(self.table_row)
        ops.solver_step(
            self.y,
            self.network.forward(),
            self.row.view(9),
            self.seeds,
            self.step,
            history=(self.m1, self.m2),
            out=(self.y, self.m),
            into=self.network.into,
        )
        # a row with C0 = 0 keeps no history
        torch.ne(self.row[:, 5], self.zero, out=self.keep)
        torch.where(self.keep, self.m1, self.m2, out=self.m2)
        torch.where(self.keep, self.m, self.m1, out=self.m1)
        self.counter.add_(1)
        self.step.sub_(1)

    def prepare(self, name: str) -> None:
        """Capture `network` or `step` if that is still to be done; this leaves the counters and the state anywhere."""
        if name not in self.graphs:
            body = {"network": self.run_network, "step": self.run_step}[name]
            with without_autocast(self.network.device):
                self.graphs[name] = self.captures.capture(self.network.device, body, self.reset)

    def replay(self, name: str) -> None:
        with self.captures.turn(self.network.device):
            self.graphs[name].replay()

    def reset(self) -> None:
        """Rows that exist: the runs before a capture move them on."""
        self.counter.zero_()
        self.step.fill_(self.capacity)
