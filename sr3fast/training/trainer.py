"""One iteration of Algorithm 1 and what it moves on: network, optimizer, moving average; and its checkpoint."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .. import image, noise
from ..data import Order, Pictures, open_items
from ..device import fast_dtype
from ..unet import UNet
from ..weights import Model, describe, described, load_pickled, save
from .algorithm import denoising_loss, p_gamma
from .config import OPTIMIZERS, TrainConfig, TrainingError, as_plain, learning_rate, of_plain
from .model import FRESH, agreeing, fresh
from .ranks import Ranks, uninterrupted

CHECKPOINT, EXPORT = "checkpoint.pt", "model"

# what may differ between a run and its resumption
FREE = {"data", "out", "resume", "iterations", "lr", "warmup", "cooldown", "max_norm", "dtype"}
FREE |= {"save_every", "log_every", "device", "workers"}
FREE |= {"threads", "compile", "capture", "tensorboard", "validation", "validate_every", "validation_steps"}


class Trainer:
    """Network, optimizer, EMA and the place in the data of one run, on one rank.

    config: the run; start: weights to begin with; moments: Adam's state by parameter name, {"step", "exp_avg",
    "exp_avg_sq"}. With config.resume it stands where its checkpoint does, and the weights are the checkpoint's.

    ValueError: options that contradict the weights, or a checkpoint that is damaged or of another configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: Model | None = None,
        moments: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        self.ranks, self.iteration = Ranks(), 0
        self.device = self.ranks.device(config.device)
        if config.dtype is None:
            config = dataclasses.replace(config, dtype=str(fast_dtype(self.device)).removeprefix("torch."))
        self.config = config
        if config.resume and (start is not None or moments is not None):
            raise ValueError("a resumed run has its checkpoint's weights: leave out start (--init), or resume")
        state = read_checkpoint(config, self.ranks.world) if config.resume else None
        if state is not None:
            start = described(state["description"], UNet(**state["description"]["unet"]))
        self.model = fresh(config) if start is None else agreeing(config, start)
        if config.crop % self.model.unet.multiple:
            raise ValueError(
                f"the crop must be a multiple of 2^(levels - 1) = {self.model.unet.multiple}: got {config.crop}"
            )
        self.unet = self.model.unet.to(self.device, torch.float32).train().requires_grad_(True)
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.parameters: list[Tensor] = list(self.unet.parameters())
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        if moments is not None:
            self._set_moments(moments)
        # dropout differs from rank to rank, the network at the start does not
        torch.manual_seed(noise.signed64((config.seed << 32) + self.ranks.rank))
        f_theta: nn.Module = self.unet
        if self.ranks.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            f_theta = DistributedDataParallel(self.unet, device_ids=ids, gradient_as_bucket_view=True)
        self.synchronised = f_theta
        self.f_theta = torch.compile(f_theta) if config.compile else f_theta
        self.loss: Callable[..., Tensor] = self._loss
        if config.capture:
            if self.device.type != "cuda" or self.ranks.world > 1 or config.accumulate > 1:
                raise ValueError("capture needs a CUDA device, one rank and accumulate=1")
            self.loss = CapturedLoss(self._loss, self.parameters)
        if state is not None:
            self._restore(state)

    def _set_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        state = {}
        named = dict(self.unet.named_parameters())
        if moments.keys() != named.keys():
            odd = sorted(moments.keys() ^ named.keys())
            raise ValueError(f"moments must be those of the network's parameters: {odd[0]} is in one of them only")
        for i, (name, parameter) in enumerate(named.items()):
            given = moments[name]
            state[i] = {"step": given["step"]}
            for key in ("exp_avg", "exp_avg_sq"):
                # the fused optimizer walks through memory: its state must have the parameter's strides
                state[i][key] = torch.empty_like(parameter.detach()).copy_(given[key])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def step(self, micro_batches: Iterator[Any]) -> float:
        """One iteration: loss and gradient over the next `accumulate` micro-batches, optimizer, EMA.

        micro_batches: yields (x, image), float32 [B / accumulate, C, crop, crop] in [-1, 1], as `batches` does. Returns
        the loss of all ranks. TrainingError: it or the gradient is not finite; no weight has changed by then.
        """
        config, accumulate = self.config, self.config.accumulate
        size = config.batch_size // accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.iteration)
        self.optimizer.zero_grad(set_to_none=not config.capture)
        total = torch.zeros((), device=self.device)
        for i in range(accumulate):
            x, picture = next(micro_batches)
            first = self.ranks.rank * config.batch_size + i * size
            total += self.loss(*self._inputs(x, picture, first), last=i == accumulate - 1)
        if self.ranks.world > 1:
            dist.all_reduce(total)
            total /= self.ranks.world
        norm = nn.utils.clip_grad_norm_(self.parameters, config.max_norm or math.inf, foreach=True)
        loss, length = torch.stack([total, norm]).tolist()
        if not math.isfinite(loss) or not math.isfinite(length):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {length}"
            written = (Path(config.out) / CHECKPOINT).exists()
            raise TrainingError(
                f"{what} at iteration {self.iteration}: try a smaller --lr (now {config.lr:g}), a longer --warmup, or "
                f"--dtype float32, {'with --resume, from the last checkpoint, or anew' if written else 'anew'}"
            )
        self.optimizer.step()
        self.iteration += 1
        decay = min(config.ema, (1 + self.iteration) / (10 + self.iteration))
        with torch.no_grad():  # else each iteration leaves its nodes in a graph without end
            torch._foreach_lerp_(list(self.averaged.parameters()), self.parameters, 1 - decay)
        return loss

    def _inputs(self, x: Tensor, picture: Tensor, first: int) -> tuple[Tensor, ...]:
        """What `denoising_loss` needs of a micro-batch whose first sample has this place in the global
        batch.
        """
        config = self.config

        def to(t: Tensor) -> Tensor:
            return t.to(self.device, non_blocking=True)

        base = config.seed << 32
        seeds = noise.seeds(base + first, len(picture))
        t_seed = base if config.t_per == "batch" else None
        gamma, t = p_gamma(self.model.schedule, seeds, self.iteration, form=config.p_gamma, t_seed=t_seed)
        if self.model.level == "t":
            gamma, level = self.model.schedule.gamma[t], t - 1
        else:
            level = (gamma.sqrt() if self.model.level == "sqrt_gamma" else gamma).float()[:, None]
        x = to(x).contiguous(memory_format=torch.channels_last)
        picture = to(picture).contiguous(memory_format=torch.channels_last)
        y_0 = self.model.target.encode(picture, x)
        if self.device.type not in noise.WITHOUT_FLOAT64:
            gamma = to(gamma)
        return x, y_0, gamma, to(level), to(seeds), to(torch.tensor(self.iteration))

    def _loss(
        self,
        x: Tensor,
        y_0: Tensor,
        gamma: Tensor,
        level: Tensor,
        seeds: Tensor,
        iteration: Tensor,
        last: bool = True,
    ) -> Tensor:
        """This micro-batch's share of the loss, its gradient added to the parameters'."""
        unet, config = self.unet, self.config
        source = x if unet.in_channels > unet.out_channels else None
        wait = contextlib.nullcontext() if last or self.ranks.world == 1 else self.synchronised.no_sync()  # type: ignore[operator]
        with wait:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = denoising_loss(self.f_theta, source, y_0, gamma, level, seeds, iteration, config.p)
            loss = loss / config.accumulate
            loss.backward()
        return loss.detach()

    def pictures(self, data: Path, augment: str) -> Pictures:
        """What is in `data`, as the network takes it."""
        config, scale = self.config, self.model.scale
        assert scale is not None  # see agreeing
        return Pictures(
            open_items(data, scale),
            crop=config.crop,
            scale=scale,
            channels=self.model.unet.out_channels,
            augment=augment,
            seed=config.seed,
        )

    def batches(self, pictures: Pictures) -> Iterator[Any]:
        """Micro-batches (x, image) of this rank from the present iteration on, without end."""
        config, ranks = self.config, self.ranks
        order = Order(
            len(pictures),
            config.batch_size,
            seed=config.seed,
            start=self.iteration,
            rank=ranks.rank,
            world=ranks.world,
        )
        return iter(
            DataLoader(
                pictures,
                batch_size=config.batch_size // config.accumulate,
                sampler=order,
                num_workers=config.workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=uninterrupted() if config.workers else None,
                # the loader draws a seed for its workers: not from the generator that dropout uses
                generator=torch.Generator().manual_seed(config.seed),
            )
        )

    # Checkpoints

    def save(self) -> None:
        """Write out/checkpoint.pt and, of the averaged weights, out/model: each is whole or as it was
        before.
        """
        rng = [torch.get_rng_state()]
        if self.device.type == "cuda":
            rng.append(torch.cuda.get_rng_state(self.device))
        gathered = self.ranks.gather(rng)
        if self.ranks.rank:
            return
        state = {
            "config": as_plain(self.config),
            "description": describe(self.model),
            "iteration": self.iteration,
            "model": self.unet.state_dict(),
            "ema": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": gathered,
        }
        path = Path(self.config.out) / CHECKPOINT
        try:
            with image.atomic(path) as temporary:
                torch.save(state, temporary)
            self.export(path.parent / EXPORT)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TrainingError(
                f"could not save at iteration {self.iteration} ({error}): free some disk, then --resume; "
                f"the last good checkpoint is {path if path.exists() else 'none yet'}"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        rng = state["rng"][self.ranks.rank]
        torch.set_rng_state(rng[0])
        if self.device.type == "cuda" and len(rng) > 1:
            torch.cuda.set_rng_state(rng[1], self.device)

    def export(self, folder: Path, dtype: torch.dtype | None = None, card: dict[str, Any] | None = None) -> None:
        """Write the averaged weights as `weights.load` reads them, in dtype where it is given, with that card."""
        save(folder, self.averaged_model(card), dtype=dtype)

    def averaged_model(self, card: dict[str, Any] | None = None) -> Model:
        """The model with the moving average of its weights, which goes on moving; card: see `weights.Model`."""
        m = self.model
        return Model(self.averaged, m.schedule, m.target, m.scale, m.level, m.card if card is None else card)


class CapturedLoss:
    """Forward and backward as one CUDA graph, recorded at the first call and replayed with new inputs."""

    def __init__(self, loss: Callable[..., Tensor], parameters: list[Tensor]) -> None:
        self.loss, self.parameters = loss, parameters
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor, last: bool = True) -> Tensor:
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.loss(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.loss(*self.inputs)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result


def read_checkpoint(config: TrainConfig, world: int) -> dict[str, Any]:
    """What is in out/checkpoint.pt. ValueError where it is damaged or of another configuration."""
    path, state = load_checkpoint(config.out)
    ours, theirs, ranks = as_plain(config), state["config"], len(state["rng"])
    other = [n for n in sorted(ours.keys() - FREE - FRESH.keys()) if ours[n] != theirs.get(n)]
    if other:
        got = ", ".join(f"{name}={theirs.get(name)!r}, not {ours[name]!r}" for name in other)
        raise ValueError(
            f"{path} was trained with {got}: give the same, as sr3fast.training.resumed has it, or another --out"
        )
    for name in ("lr", "warmup", "max_norm", "dtype"):
        if ours[name] != theirs.get(name):
            warnings.warn(f"from here on {name}={ours[name]!r}, it was {theirs.get(name)!r}", stacklevel=2)
    if ranks != world:
        raise ValueError(f"{path} was trained on {ranks} ranks, not {world}: start as many")
    return state


def resumed(out: str | Path) -> TrainConfig:
    """The configuration that goes on with the run in `out`: its own, with resume on. Raises what `train` does then."""
    _, state = load_checkpoint(out)
    return dataclasses.replace(of_plain(state["config"]), out=Path(out), resume=True)


def load_checkpoint(out: str | Path) -> tuple[Path, dict[str, Any]]:
    """out/checkpoint.pt, and what is in it."""
    path = Path(out) / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist (leave out --resume to start)")
    try:
        state = dict(load_pickled(path))
        known = "description" in state
        of_plain(state["config"]), len(state["rng"])
    except (pickle.UnpicklingError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or no checkpoint of sr3fast train: begin another --out with --init "
            f"{path.parent / EXPORT}, its averaged weights"
        ) from error
    if not known:
        raise ValueError(
            f"{path} is of an older sr3fast: go on with that one, or begin another --out with --init "
            f"{path.parent / EXPORT}, its averaged weights"
        )
    return path, state
