"""A run over the noise levels: layer by layer, or on CUDA by replays of a captured graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .capture import ROWS, Captures, Graph
from .network import Network, without_autocast


class Run:
    """f_theta(x, y_t, levels[i]) = run(i), for the y_t in `into`; the result is valid until the next call."""

    def __init__(self, network: Network, levels: Tensor):
        self.network, self.levels = network, levels
        self.x, self.into = network.x, network.into
        self.table = network.noise(levels) if network.form.noise_table else None

    @torch.no_grad()
    def __call__(self, i: int) -> Tensor:
        with without_autocast(self.network.device):
            if self.table is None:
                self.network.set(self.network.noise(self.levels[i : i + 1]))
            else:
                self.network.set(self.table[i])
            return self.network.forward()


class CapturedRun(Run):
    """The same by one replay; `loop` has the solver's step in it too."""

    def __init__(self, network: Network, levels: Tensor, captures: Captures):
        super().__init__(network, levels)
        if network.graph is None or network.graph.capacity < len(levels):
            network.graph = None  # its memory first
            network.graph = Graph(captures, network, max(len(levels), ROWS))
        self.graph = network.graph
        self.graph.table[: len(levels)].copy_(network.noise(levels) if self.table is None else self.table)

    @torch.no_grad()
    def __call__(self, i: int) -> Tensor:
        self.graph.prepare("network")
        self.graph.counter.fill_(i)
        self.graph.replay("network")
        return self.graph.eps_hat

    @torch.no_grad()
    def loop(self, y: Tensor, rows: Tensor, seeds: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
        """step(i) for i = 0..N-1 in turn: network and solver_step in one replay; returns y and m.

        y: float32 [B, Cy, H, W], the state to begin with, which is left as it is. rows: float32 [N, 9].
        seeds: int64 [B]. What step returns is overwritten by the next.
        """
        graph, N = self.graph, len(rows)
        graph.prepare("step")
        graph.rows[:N].copy_(rows)
        graph.seeds.copy_(seeds)
        graph.y.copy_(y)
        self.into.copy_(y)
        graph.counter.zero_()
        graph.step.fill_(N)

        @torch.no_grad()
        def step(i: int) -> tuple[Tensor, Tensor]:
            self.graph.replay("step")  # not `graph`: the network is the run's own as long as there is a run
            return graph.y, graph.m

        return step
