"""Algorithm 2 of SR3 (Saharia et al. 2021) for any solver: from noise to picture, one row at a time."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from . import noise, ops
from .contract import FLOATS
from .device import find_device
from .engine import Engine, refusal
from .image import divisible, resize
from .schedule import Schedule, whole_number
from .solver import LEVELS, Table, default, rows
from .unet import evaluation_mode

if TYPE_CHECKING:
    from .weights import Target

__all__ = ["Network", "Run", "Sampler", "Samples", "draw_seed", "network"]

log = logging.getLogger(__name__)


Callback = Callable[[int, Tensor, Tensor], Any]
Function = Callable[[Tensor | None, Tensor, Tensor], Tensor]


class Samples(NamedTuple):
    """n samples of one source, and what they say about it: where std is large, the picture is a guess."""

    y_0: Tensor  # [n, C, H, W]
    mean: Tensor  # [C, H, W]
    std: Tensor  # [C, H, W], the unbiased one (n - 1)


class Run(Protocol):
    """f_theta for one run: the places of x and y_t in its input, and run(i), which is eps_hat at row i."""

    @property
    def x(self) -> Tensor | None: ...  # [B, Cx, H, W]

    @property
    def into(self) -> Tensor: ...  # [B, Cy, H, W], any float dtype and strides

    def __call__(self, i: int) -> Tensor: ...


class Sampler:
    """Draws y_0 from p(y_0 given x), with a network that predicts the noise.

        y_T ~ N(0, I)
        for each row of the solver's table, at noise level gamma:
            y <- the row's step from (y, f_theta(x, y, gamma)), plus noise

    Equivalent to (other draws; solver="sr3")::

        y = torch.randn_like(x)
        for t in range(T, 0, -1):
            f = f_theta(x, y, gamma[t].sqrt().expand(B, 1))
            y = (y - (1 - alpha[t]) / (1 - gamma[t]).sqrt() * f) / alpha[t].sqrt()
            y += (1 - alpha[t]).sqrt() * torch.randn_like(y) if t > 1 else 0

    Args:
        f_theta: any callable (x, y_t, level) -> eps_hat of y_t's shape. level is float32 [B, 1], or int64 [B]
            where level="t". A module in training mode is run in evaluation mode and gets its mode back. Or an
            object that starts its own runs (`Network`).
        schedule: the one it was trained with.
        solver, steps, grid, eta, variance, clip, corrector_steps, snr: see `solver.rows`. By default "sr3" on
            every step, and where `steps` is given "dpm++2m" on the grid "blend".
        level: what f_theta is conditioned on: "sqrt_gamma" (Janspiry's code), "gamma" (the paper), or "t",
            the index 0..T-1 into betas.
        dtype: of x and y_t as f_theta gets them; by default that of its parameters, or float32. The state y_t
            itself is float32 always.
        device: where to sample; x is copied there. By default where f_theta's parameters are, or x.
        graph: run f_theta as a CUDA graph: "auto" for our UNet, True for any (checked against eager), False.
        target: what y_0 is to the weights (`weights.Target`): the image, or a residual, decoded at the end.
        scale: enlargement from the source to x; consistency=True needs it.

    Attributes:
        table: the solver's rows; len(table) network passes a sample.
        last_seed: the seed of the last call, the drawn one where it was None.

    Raises:
        ValueError, TypeError: an option out of its range; nothing has run by then.
    """

    def __init__(
        self,
        f_theta: Function | Network,
        schedule: Schedule,
        *,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | Tensor | None = None,
        eta: float = 0.0,
        variance: float = 0.0,
        clip: float | EllipsisType | None = ...,
        level: str = "sqrt_gamma",
        corrector_steps: int = 0,
        snr: float = 0.16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        graph: bool | str = "auto",
        target: Target | None = None,
        scale: float | None = None,
    ):
        if not (callable(f_theta) or hasattr(f_theta, "start_run")):
            raise TypeError(f"f_theta must be callable as f_theta(x, y_t, level): got {type(f_theta).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a sr3fast.Schedule: got {type(schedule).__name__}")
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}: got {level!r}")
        variant = getattr(f_theta, "variant", None)
        if variant in ("sr3", "ddpm") and (variant == "ddpm") != (level == "t"):
            raise ValueError(f"a {variant} network is not conditioned on level={level!r}")
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, float16 or bfloat16: got {dtype}")
        if not (graph in (True, False) or graph == "auto"):
            raise ValueError(f'graph must be "auto", True or False: got {graph!r}')
        if scale is not None and not 1 <= scale < math.inf:
            raise ValueError(f"scale must be at least 1: got {scale}")
        solver = default(steps, grid) if solver is None else solver
        if clip is ... and target is not None and solver != "sr3":
            clip = target.clip
        self._options: dict[str, Any] = {
            "solver": solver,
            "steps": steps,
            "grid": grid,
            "eta": eta,
            "variance": variance,
            "clip": clip,
            "corrector_steps": corrector_steps,
            "snr": snr,
            "integer": level == "t",
        }
        self.f_theta = f_theta
        self.schedule = schedule
        self.level = level
        self.dtype = dtype
        self.graph = graph
        self.target = target
        self.scale = scale
        self.table = rows(schedule, **self._options)
        self.last_seed: int | list[int] | None = None
        self._device = None if device is None else find_device(device)
        self._network = network(f_theta, dtype, graph)

    @overload
    def __call__(
        self,
        x: Tensor | None,
        seed: int | Sequence[int] | Tensor | None = 0,
        *,
        shape: Sequence[int] | None = None,
        y_T: Tensor | None = None,
        start: float | None = None,
        z: Callable[[int], Tensor] | None = None,
        consistency: bool = False,
        callback: Callback | None = None,
        progress: bool = False,
        samples: None = None,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        x: Tensor | None,
        seed: int | Sequence[int] | Tensor | None = 0,
        *,
        shape: Sequence[int] | None = None,
        y_T: Tensor | None = None,
        start: float | None = None,
        z: Callable[[int], Tensor] | None = None,
        consistency: bool = False,
        callback: Callback | None = None,
        progress: bool = False,
        samples: int,
    ) -> Samples: ...

    def __call__(
        self,
        x: Tensor | None,
        seed: int | Sequence[int] | Tensor | None = 0,
        *,
        shape: Sequence[int] | None = None,
        y_T: Tensor | None = None,
        start: float | None = None,
        z: Callable[[int], Tensor] | None = None,
        consistency: bool = False,
        callback: Callback | None = None,
        progress: bool = False,
        samples: int | None = None,
    ) -> Tensor | Samples:
        """Sample y_0 given x.

        Args:
            x: the source at the target's size, [B, Cx, H, W] in [-1, 1]; None for an unconditional network.
            seed: sample i has the seed s + i, or its own of B seeds; None draws one (see `last_seed`). A
                sample does not depend on the batch it is drawn in.
            shape: of y_0, [B, Cy, H, W]; by default f_theta.out_channels, or x's channels, at x's size.
            y_T: start from this instead of noise, [B, Cy, H, W].
            start: in [0, 1): leave out this share of the rows and begin from q_sample(x, gamma) there.
            z: z(step) gives a step's noise, [B, Cy, H, W]; asked for the steps that add noise, never step 1.
            consistency: add up(down(x) - down(y_0)), so that y_0 shrinks to the source; needs `scale`.
            callback: called after each row with (step, y, y_0_hat), step = N - 1 .. 0 rows to go.
            progress: show a progress bar.
            samples: draw n of the one source, with seeds s .. s + n - 1.

        Returns:
            y_0, float32 [B, Cy, H, W], not clamped; `Samples` where samples= is given. Where it is not finite,
            a warning says so.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or options that do not fit, before any step.
        """
        if samples is not None:
            x, shape = _repeat(x, shape, samples)
        inputs = self._inputs(x, seed, shape, y_T, start, z, consistency)
        with contextlib.closing(self._refine(inputs, callback, progress)) as steps:
            for _ in steps:
                pass
        y_0 = self._image(inputs.y, inputs.x, consistency)
        if samples is None:
            return y_0
        std, mean = torch.std_mean(y_0, 0)
        return Samples(y_0, mean, std)

    def iterate(
        self,
        x: Tensor | None,
        seed: int | Sequence[int] | Tensor | None = 0,
        *,
        shape: Sequence[int] | None = None,
        y_T: Tensor | None = None,
        start: float | None = None,
        z: Callable[[int], Tensor] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (step, y) after each row, step = N - 1 down to 0; y is yours to keep.

        Arguments as in `__call__`. y is the state, which ends in what the weights call y_0: for a residual
        target that is the residual. Close the generator, or leave its loop, to stop.
        """
        inputs = self._inputs(x, seed, shape, y_T, start, z)
        return ((step, y.clone()) for step, y in self._refine(inputs, callback, progress))

    def frames(
        self,
        x: Tensor | None,
        seed: int | Sequence[int] | Tensor | None = 0,
        *,
        count: int = 8,
        of: str = "y",
        shape: Sequence[int] | None = None,
        y_T: Tensor | None = None,
        start: float | None = None,
        z: Callable[[int], Tensor] | None = None,
        consistency: bool = False,
        progress: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (step, picture) of `count` steps evenly spread over the run, the last of them y_0 itself.

        of="y" shows the state, from pure noise (step N) on; of="y_0_hat" what it is expected to become, from
        the first row (step N - 1) on. Pictures are [B, C, H, W], decoded and clamped to [-1, 1]; the other
        arguments are those of a call. Nothing runs further than the frames that are asked for.
        """
        if of not in ("y", "y_0_hat"):
            raise ValueError(f'of must be "y" or "y_0_hat": got {of!r}')
        whole_number("count", count, at_least=2)
        inputs = self._inputs(x, seed, shape, y_T, start, z, consistency)
        return self._frames(inputs, count, of, consistency, progress)

    def _frames(
        self, inputs: _Inputs, count: int, of: str, consistency: bool, progress: bool
    ) -> Iterator[tuple[int, Tensor]]:
        first = len(inputs.table) - (of == "y_0_hat")
        shown = {round(first * k / (count - 1)) for k in range(count)}
        estimate = inputs.y

        def keep(step: int, y: Tensor, y_0_hat: Tensor) -> None:
            nonlocal estimate
            estimate = y_0_hat

        def picture(step: int, y: Tensor) -> Tensor:
            return self._image(y, inputs.x, consistency and step == 0).clamp(-1, 1)

        if of == "y":
            yield first, picture(first, inputs.y)
        with contextlib.closing(self._refine(inputs, keep if of == "y_0_hat" else None, progress)) as steps:
            for step, y in steps:
                if step in shown:
                    yield step, picture(step, y if of == "y" or step == 0 else estimate)

    @torch.no_grad()
    def _refine(
        self, inputs: _Inputs, callback: Callback | None = None, progress: bool = False
    ) -> Generator[tuple[int, Tensor], None, None]:
        """(step, y) after each row, step = N - 1 .. 0; y is overwritten by the next, and ends in inputs.y."""
        table = inputs.table
        with _bar(len(table), progress) as bar:
            f_theta = self._network.start_run(inputs.x, inputs.y.shape, table.levels(self.level).to(inputs.y.device))
            f_theta.into.copy_(inputs.y)
            if inputs.z is None and hasattr(f_theta, "loop"):
                rows = _replayed(f_theta, inputs)
            else:
                rows = _stepped(f_theta, inputs, wanted=callback is not None)
            for step, y, m in rows:
                if step == 0 and y is not inputs.y:
                    inputs.y.copy_(y)
                bar.update()
                if callback is not None:
                    callback(step, y.clone(), cast(Tensor, m).clone())
                yield step, y
        if not inputs.y.isfinite().all():
            _warn("y_0 is not finite: f_theta gave infinity or NaN on the way (weights, or the range of its dtype)")

    def _inputs(
        self,
        x: Tensor | None,
        seed: int | Sequence[int] | Tensor | None,
        shape: Sequence[int] | None = None,
        y_T: Tensor | None = None,
        start: float | None = None,
        z: Callable[[int], Tensor] | None = None,
        consistency: bool = False,
    ) -> _Inputs:
        if x is not None:
            _check_x(x)
        if y_T is not None and not (isinstance(y_T, Tensor) and y_T.is_floating_point()):
            raise TypeError(f"y_T must be a float tensor: got {y_T.dtype if isinstance(y_T, Tensor) else type(y_T)}")
        device = self._place(x, y_T)
        if x is not None:
            x = x.detach().to(device, torch.float32)
        shape = self._shape(x, shape, y_T)
        if self.target is not None and self.target.kind == "residual" and (x is None or x.shape != shape):
            raise ValueError(f"a residual target needs x of y's shape {list(shape)}: got {_shape_of(x)}")
        if z is not None and not callable(z):
            raise TypeError(f"z must be callable as z(step): got {type(z).__name__}")
        if consistency:
            self._check_consistency(x, shape)
        if seed is None:
            seed = draw_seed()
        seeds = noise.seeds(seed, shape[0], device)
        table = self.table if start is None else rows(self.schedule, **self._options, start=start)
        y = self._first(x, shape, seeds, y_T, start, table)
        if isinstance(seed, Sequence | np.ndarray):
            self.last_seed = [int(s) for s in seed]
        else:
            self.last_seed = seeds.tolist() if isinstance(seed, Tensor) else int(seed)
        return _Inputs(x, y, seeds, table, z)

    def _first(
        self,
        x: Tensor | None,
        shape: tuple[int, ...],
        seeds: Tensor,
        y_T: Tensor | None,
        start: float | None,
        table: Table,
    ) -> Tensor:
        """The state before the first row, a tensor of our own: y_T, the diffused x, or noise."""
        if y_T is not None:
            if start is not None:
                raise ValueError("y_T and start both say where to begin: give one of them")
            return y_T.detach().to(seeds.device, torch.float32, copy=True).contiguous()
        z = ops.noise(shape, seeds, domain=noise.Y_T, device=seeds.device)
        gamma = table.gamma[0].item()
        if start is not None:
            if x is None or x.shape != shape:
                raise ValueError(f"start begins from x, of y's shape {list(shape)}: got {_shape_of(x)}")
            y_0 = x if self.target is None else self.target.encode(x, x)
            return ops.q_sample(y_0, gamma, None, eps=z)[0]
        if gamma > self.schedule.gamma[-1].item() * (1 + 1e-4):
            raise ValueError(
                f"this grid begins at gamma = {gamma:.3g}, later than gamma_T ="
                f" {self.schedule.gamma[-1].item():.3g}: give y_T, or start for the diffused x"
            )
        return z

    def _place(self, x: Tensor | None, y_T: Tensor | None) -> torch.device:
        given = x if x is not None else y_T
        own = next((p.device for p in _parameters(self.f_theta)), None)
        if self._device is not None:
            return self._device
        if given is None:
            return own or torch.device("cpu")
        if own is not None and given.device != own:
            raise ValueError(
                f"x and f_theta must be on one device (or Sampler(device=) says where): got {given.device} and {own}"
            )
        return given.device

    def _shape(self, x: Tensor | None, shape: Sequence[int] | None, y_T: Tensor | None) -> tuple[int, int, int, int]:
        if shape is None and y_T is not None:
            shape = y_T.shape if x is None or y_T.ndim != 4 else (x.shape[0], y_T.shape[1], *x.shape[2:])
        if shape is None:
            if x is None:
                raise ValueError("x is None, so shape=(B, C, H, W) must say what to sample")
            shape = (x.shape[0], getattr(self.f_theta, "out_channels", x.shape[1]), *x.shape[2:])
        if len(shape) != 4 or any(n < 1 for n in shape):
            raise ValueError(f"shape must be (B, C, H, W), each at least 1: got {tuple(shape)}")
        B, C, H, W = (int(n) for n in shape)
        if y_T is not None and y_T.shape != (B, C, H, W):
            raise ValueError(f"y_T must be of shape {[B, C, H, W]}: got {list(y_T.shape)}")
        if x is not None and (x.shape[0], *x.shape[2:]) != (B, H, W):
            raise ValueError(f"x must be [{B}, C, {H}, {W}], y's batch and size: got {list(x.shape)}")
        return B, C, H, W

    def _check_consistency(self, x: Tensor | None, shape: tuple[int, ...]) -> None:
        if self.scale is None:
            raise ValueError("consistency=True needs the enlargement: Sampler(..., scale=4)")
        if x is None or x.shape != shape:
            raise ValueError(f"consistency compares y_0 with x of its shape {list(shape)}: got {_shape_of(x)}")
        if divisible(shape[2:], self.scale)[0] != tuple(shape[2:]):
            raise ValueError(f"consistency needs sides that scale={self.scale:g} divides: got {list(shape[2:])}")

    @torch.no_grad()
    def _image(self, y: Tensor, x: Tensor | None, consistency: bool) -> Tensor:
        """The picture that y is to the weights, made consistent with the source where asked."""
        y_0 = y.clone() if self.target is None else self.target.decode(y, x)
        if consistency and x is not None and self.scale is not None:
            H, W = y_0.shape[2:]
            _, small = divisible((H, W), self.scale)
            y_0 = y_0 + resize(resize(x, small) - resize(y_0, small), (H, W))
        return y_0

    def __repr__(self) -> str:
        options = {k: v for k, v in self._options.items() if v is not None and k != "integer"}
        options["clip"] = self.table.rows[0, 2].item()
        return f"Sampler({type(self.f_theta).__name__}, {self.schedule!r}, {len(self.table)} rows, {options})"


@dataclass(frozen=True)
class _Inputs:
    """A call's arguments, checked, on the device."""

    x: Tensor | None
    y: Tensor  # the state, overwritten by each step
    seed: Tensor  # int64 [B]
    table: Table
    z: Callable[[int], Tensor] | None


# ---------------------------------------------------------------------------------------- Algorithm 2


def _stepped(f_theta: Run, inputs: _Inputs, wanted: bool) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Row by row: (rows to go, y, m). wanted: m, the estimate of y_0, is there also where no later row reads it."""
    y, table = inputs.y, inputs.table
    history = [torch.empty_like(y) for _ in range(table.depth)]  # m_{t+1}, m_{t+2}
    y_0_hat = torch.empty_like(y) if wanted else None
    for i, row in enumerate(table.rows.tolist()):
        step = len(table) - i
        *_, C0, _, _, S = row
        eps_hat = f_theta(i)
        keep = C0 != 0 and table.depth > 0
        m = history[-1] if keep else y_0_hat
        z = None if inputs.z is None or S == 0 else inputs.z(step)
        ops.solver_step(y, eps_hat, row, inputs.seed, step, history=history, z=z, out=(y, m), into=f_theta.into)
        if keep:
            history = [history[-1], *history[:-1]]
        yield step - 1, y, m


def _replayed(f_theta: Any, inputs: _Inputs) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The same, a row one replay of a CUDA graph."""
    N = len(inputs.table)
    replay = f_theta.loop(inputs.y, inputs.table.rows, inputs.seed)
    for i in range(N):
        yield N - 1 - i, *replay(i)


# ------------------------------------------------------------------------------------- the network


class Network(Protocol):
    """What starts a run: the engine, the adapter, windows over either."""

    def start_run(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> Run:
        """A run over `levels`, float32 or int64 [N], for x [B, Cx, H, W] or None and y of `shape`."""
        ...


def network(f_theta: Any, dtype: torch.dtype | None = None, graph: bool | str = "auto") -> Network:
    """f_theta itself where it starts its runs, the engine for our UNet, the adapter for another callable."""
    if hasattr(f_theta, "start_run"):
        if dtype is not None or graph != "auto":
            raise ValueError(f"{type(f_theta).__name__} starts its own runs: give it dtype and graph, not the sampler")
        return f_theta
    if refusal(f_theta) is None:
        return Engine(f_theta, dtype, graph=graph)
    return _Adapter(f_theta, dtype, graph is True)


class _Adapter:
    """Any f_theta(x, y_t, level) behind the engine's interface."""

    def __init__(self, f_theta: Function, dtype: torch.dtype | None, graph: bool):
        self.f_theta = f_theta
        self.dtype = dtype
        self.graph = graph

    def start_run(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> _EagerRun:
        if self.graph and levels.device.type != "cuda":
            raise ValueError(f"graph=True captures a CUDA graph: got tensors on {levels.device}")
        dtype = self.dtype or next((p.dtype for p in _parameters(self.f_theta) if p.is_floating_point()), torch.float32)
        run = _CapturedRun if self.graph else _EagerRun
        return run(self.f_theta, None if x is None else x.to(dtype), shape, levels, dtype)


class _EagerRun:
    def __init__(self, f_theta: Function, x: Tensor | None, shape: Sequence[int], levels: Tensor, dtype: torch.dtype):
        self.f_theta = f_theta
        self.x = x
        self.dtype = dtype
        own = dtype if dtype in FLOATS else torch.float32  # the ops write no float64
        self.into = torch.empty(tuple(shape), dtype=own, device=levels.device)
        batch = (shape[0], 1) if levels.is_floating_point() else (shape[0],)
        self.levels = levels.view(-1, *(1,) * len(batch)).expand(-1, *batch)  # [N, B, 1] or [N, B]

    def __call__(self, i: int) -> Tensor:
        eps_hat = self.call(self.levels[i])
        if not isinstance(eps_hat, Tensor) or eps_hat.shape != self.into.shape:
            raise ValueError(f"f_theta must return y_t's shape {list(self.into.shape)}: got {_shape_of(eps_hat)}")
        return eps_hat.float() if eps_hat.dtype == torch.float64 else eps_hat

    def call(self, level: Tensor) -> Tensor:
        """f_theta on copies, which it may keep, or overwrite; without dropout."""
        x = None if self.x is None else self.x.clone()
        with evaluation_mode(self.f_theta):
            return self.f_theta(x, self.into.to(self.dtype, copy=True), level.clone())


class _CapturedRun(_EagerRun):
    """The same as a CUDA graph, captured at the first row; its first replays are checked against eager."""

    CHECKED = 2  # the second row has another y_t and level: a graph that ignores them shows
    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, i: int) -> Tensor:
        if self.graph is None:
            self.level = self.levels[i].clone()
            self.graph = self._capture()
        self.level.copy_(self.levels[i])
        self.graph.replay()
        if i < self.CHECKED:
            self._check(super().__call__(i))
        return self.eps_hat

    def _capture(self) -> torch.cuda.CUDAGraph:
        device = self.into.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # lazy initialisations must not be captured
            for _ in range(2):
                super().__call__(0)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            eps_hat = self.call(self.level)
            self.eps_hat = eps_hat.float() if eps_hat.dtype == torch.float64 else eps_hat
        return graph

    def _check(self, eager: Tensor) -> None:
        # convolutions may choose other algorithms under capture: equal up to rounding
        tolerance = 64 * torch.finfo(self.into.dtype).eps * max(eager.abs().max().item(), 1.0)
        off = (self.eps_hat.float() - eager.float()).abs().max().item()
        if not off <= tolerance:
            raise RuntimeError(
                f"f_theta gives other results as a CUDA graph (off by {off:.3g}, more than {tolerance:.3g}):"
                " it does work on the host that a graph does not repeat; pass graph=False"
            )


def _parameters(f_theta: Any) -> Iterator[Tensor]:
    return iter(f_theta.parameters() if isinstance(f_theta, nn.Module) else ())


# --------------------------------------------------------------------------------------- arguments


def draw_seed() -> int:
    """A seed for seed=None; the log tells it."""
    seed = secrets.randbits(53)  # exact in JSON
    log.info("seed=None drew the seed %d", seed)
    return seed


def _check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [B, C, H, W] in [-1, 1] (see sr3fast.upscale for pictures): got {type(x)}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [B, C, H, W], each at least 1: got {list(x.shape)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x must be real numbers: got {x.dtype}")
    low, high = (v.item() for v in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"x must be finite: got values from {low} to {high}")
    if not x.is_floating_point() or high > 16:
        _warn(f"x looks like uint8 (values from {low:g} to {high:g}); SR3 works on [-1, 1]: x / 127.5 - 1")
    elif 0 <= low < high <= 1:
        _warn(f"x looks like [0, 1] (values from {low:g} to {high:g}); SR3 works on [-1, 1]: 2 * x - 1")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _repeat(x: Tensor | None, shape: Sequence[int] | None, n: int) -> tuple[Tensor | None, Sequence[int] | None]:
    """One source n times."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"samples must be a whole number of at least 2, to have a deviation: got {n!r}")
    batch = x.shape[0] if isinstance(x, Tensor) and x.ndim == 4 else shape[0] if shape else 1
    if batch != 1:
        raise ValueError(f"samples={n} draws from one source: got a batch of {batch}")
    if isinstance(x, Tensor) and x.ndim == 4:
        x = x.expand(n, -1, -1, -1)
    return x, None if shape is None else (n, *shape[1:])


def _shape_of(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value) if value is None else str(type(value))


class _NoBar:
    def update(self) -> None: ...


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield _NoBar()
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="sampling", unit="step", dynamic_ncols=True, leave=None) as bar:
        yield bar
