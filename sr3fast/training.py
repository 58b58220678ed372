"""Training SR3: Algorithm 1 of Saharia et al. 2021 (arXiv:2104.07636) on the fused ops.

`denoising_loss` is the algorithm, `Trainer.step` one iteration of it, `train` the loop around it. A run is
known from its configuration: data, noise, t and gamma are functions of (seed, iteration, place in the global
batch), so any number of ranks sees the same batches and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # early: its defaults keep for ever the process group that they find at import
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import image, metrics, noise, ops
from .data import Order, Pictures, open_items
from .sampler import Sampler, find_device
from .schedule import Schedule
from .unet import UNet
from .weights import Model, Structure, Target, describe, described, save

CHECKPOINT, EXPORT, LOG, SHEET = "checkpoint.pt", "model", "log.jsonl", "contact_sheet.png"

# the model's options, and what they are where a run begins with none; checked against the model that there is
FRESH: dict[str, Any] = dict(scale=4.0, channels=32, multipliers=(1, 2, 4, 4), blocks=2, attention=(), groups=8)
FRESH |= dict(dropout=0.0, image_channels=3, variant="sr3", target="image", k=1.0, clip=1.0, level="sqrt_gamma")
FRESH |= dict(schedule="linear", T=2000, beta_start=1e-6, beta_end=1e-2)
# what may differ between a run and its resumption
FREE = {"data", "out", "resume", "iterations", "cooldown", "save_every", "log_every", "device", "workers"}
FREE |= {"threads", "compile", "capture", "tensorboard", "validation", "validate_every", "validation_steps"}


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says where it stopped, what to try, and which checkpoint is
    left.
    """


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the flags of `sr3fast train`.

    The options of the model are by default those of the weights that the run begins with or resumes, and one that
    is given must agree with them; new weights have what stands behind "new".
    """

    data: Path  # folder of pictures, of hr/ and lr/, Janspiry's folders or LMDB, or a .npy [N, C, H, W]
    out: Path  # folder of the run: checkpoint.pt, model/, log.jsonl
    resume: bool = False  # go on from the checkpoint in `out`
    iterations: int = 100_000  # optimizer steps in all, those before --resume included
    batch_size: int = 16  # of one rank and iteration, micro-batches included
    crop: int = 64  # side of a training crop, in pixels of the target
    lr: float = 1e-4  # learning rate at its highest
    seed: int = 0  # of weights, order, augmentation, noise
    device: str = "auto"  # auto: cuda where there is one, else cpu
    save_every: int = 1000  # iterations between checkpoints

    scale: float | None = None  # model: how many times smaller the source is (new: 4)
    channels: int | None = None  # model: width of the first level (new: 32; SR3's: 64)
    multipliers: tuple[int, ...] | None = None  # model: of the width, a level (new: 1 2 4 4; SR3's: 1 2 4 8 8)
    blocks: int | None = None  # model: residual blocks a level (new: 2)
    attention: tuple[int, ...] | None = None  # model: resolutions with attention, from the crop's side on (new: none)
    groups: int | None = None  # model: of the norms (new: 8; SR3's: 32)
    dropout: float | None = None  # model: share of what it leaves out (new: 0; SR3's 16 -> 128: 0.2)
    image_channels: int | None = None  # model: of the pictures (new: 3)
    variant: str | None = None  # model: sr3, told a continuous noise level (new), or ddpm, an integer t
    target: str | None = None  # model: what y_0 is: image, SR3's own (new), or residual, clip(k (image - x)), SRDiff's
    k: float | None = None  # model: of a residual (new: 1)
    clip: float | None = None  # model: bound on a residual (new: 1)
    schedule: str | None = None  # model: of beta: linear (new), quad, warmup10, warmup50, const, cosine
    T: int | None = None  # model: steps of the schedule (new: 2000)
    beta_start: float | None = None  # model: the first beta (new: 1e-6)
    beta_end: float | None = None  # model: the last beta (new: 1e-2)
    level: str | None = None  # model: what it is told: sqrt_gamma (new), gamma, or t (variant ddpm)

    p_gamma: str = "gamma"  # uniform between its neighbours in gamma (the paper) or sqrt_gamma (Janspiry)
    t_per: str = "sample"  # sample, or batch: one t for the whole batch, as Janspiry's code
    p: int = 2  # of the loss |eps_hat - eps|^p: 1 or 2

    optimizer: str = "adam"  # adam or adamw
    weight_decay: float = 0.0  # of the optimizer
    betas: tuple[float, float] = (0.9, 0.999)  # of the optimizer
    warmup: int = 1000  # iterations over which lr rises linearly
    cooldown: int = 0  # last iterations, over which lr falls linearly to 0
    accumulate: int = 1  # micro-batches an iteration
    max_norm: float = 1.0  # of the gradient; 0: no clipping
    ema: float = 0.9999  # decay at most; (1 + i) / (10 + i) while that is less
    bf16: bool = True  # autocast; parameters, statistics of norms and the loss stay float32

    augment: str = "flip"  # none, flip, dihedral
    workers: int = 0  # processes that load data
    threads: int = 0  # of torch on the CPU; 0: its own choice
    compile: bool = False  # torch.compile the network
    capture: bool = False  # CUDA: forward and backward as one graph

    log_every: int = 50  # iterations
    validation: Path | None = None  # data that is not trained on
    validate_every: int = 5000  # iterations
    validation_steps: int = 10  # of the sampler
    tensorboard: bool = False  # write scalars and samples to out/tensorboard

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "crop", "save_every", "accumulate", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        for name, choices in (
            ("p_gamma", ("gamma", "sqrt_gamma")),
            ("t_per", ("sample", "batch")),
            ("optimizer", tuple(OPTIMIZERS)),
            ("p", (1, 2)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}: got {getattr(self, name)!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch: got batch_size={self.batch_size}, accumulate={self.accumulate}"
            )
        if not self.lr > 0 or not 0 <= self.ema < 1:
            raise ValueError(f"lr must be above 0 and ema in [0, 1): got lr={self.lr}, ema={self.ema}")


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# Algorithm 1


def p_gamma(
    schedule: Schedule, seeds: Tensor, iteration: int, *, form: str = "gamma", t_seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """gamma ~ p(gamma): t uniform in 1..T, then gamma uniform in (gamma_t, gamma_{t-1}); arXiv:2104.07636,
    section 2.4.

    form "sqrt_gamma" draws sqrt(gamma) uniformly in its interval, as Janspiry's code does. seeds: int64 [B];
    t_seed: the seed whose t all samples share. Returns gamma, float64 [B], and t, int64 [B], on the CPU.
    """
    u, v = noise.uniforms(seeds, noise.LEVEL, iteration)
    if t_seed is not None:
        u = noise.uniforms(torch.tensor([noise.signed64(t_seed)]), noise.LEVEL, iteration)[0].expand_as(v)
    t = 1 + (schedule.T * u.double()).floor().long()
    gamma = schedule.gamma if form == "gamma" else schedule.gamma.sqrt()
    drawn = gamma[t] + v.double() * (gamma[t - 1] - gamma[t])
    return (drawn if form == "gamma" else drawn.square()), t


def denoising_loss(
    f_theta: Callable[[Tensor | None, Tensor, Tensor], Tensor],
    x: Tensor | None,
    y_0: Tensor,
    gamma: Tensor,
    level: Tensor,
    seeds: Tensor,
    iteration: int | Tensor,
    p: int = 2,
) -> Tensor:
    """E |f_theta(x, sqrt(gamma) y_0 + sqrt(1 - gamma) eps, level) - eps|^p: lines 4 and 5 of Algorithm 1.

    x, y_0: [B, C, H, W] float32; gamma: [B]; level: what the network is told of it; seeds: int64 [B], of eps.
    """
    y_t, eps = ops.q_sample(y_0, gamma, seeds, iteration)
    error = f_theta(x, y_t, level).float() - eps
    return error.square().mean() if p == 2 else error.abs().mean()


# One iteration


@dataclass
class Ranks:
    """This process among those of torchrun; alone without it."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    world: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", 1)))
    local: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", 0)))


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
        self.config, self.ranks, self.iteration = config, Ranks(), 0
        self.device = _device(config.device, self.ranks.local)
        if config.resume and start is not None:
            raise ValueError("a resumed run has its checkpoint's weights: leave out start (--init), or resume")
        state = _read(config, self.ranks.world) if config.resume else None
        if state is not None:
            start = described(state["description"], UNet(**state["description"]["unet"]))
        self.model = fresh(config) if start is None else _agreeing(config, start)
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
            self.loss = Captured(self._loss, self.parameters)
        if state is not None:
            self._restore(state)

    def _set_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        state = {}
        for i, (name, parameter) in enumerate(self.unet.named_parameters()):
            given = moments[name]
            state[i] = {"step": given["step"]}
            for key in ("exp_avg", "exp_avg_sq"):
                # the fused optimizer walks through memory: its state must have the parameter's strides
                state[i][key] = torch.empty_like(parameter.detach()).copy_(given[key])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def step(self, micro_batches: Iterator[Any]) -> float:
        """One iteration: loss and gradient over the micro-batches, optimizer, EMA. Returns the loss of all
        ranks.
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
        if not math.isfinite(loss := total.item()):
            raise TrainingError(
                f"the loss is {loss} at iteration {self.iteration}: try a smaller lr (now {config.lr:g}), "
                "a longer warmup, or --no-bf16; the last checkpoint is untouched, --resume goes on from it"
            )
        if config.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, config.max_norm, foreach=True)
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
        return x, y_0, to(gamma.float()), to(level), to(seeds), to(torch.tensor(self.iteration))

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
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                loss = denoising_loss(self.f_theta, source, y_0, gamma, level, seeds, iteration, config.p)
            loss = loss / config.accumulate
            loss.backward()
        return loss.detach()

    def pictures(self, data: Path, augment: str) -> Pictures:
        """What is in `data`, as the network takes it."""
        config, scale = self.config, self.model.scale
        assert scale is not None  # see _agreeing
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
                worker_init_fn=_ignore_interrupts,
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
        if self.ranks.world > 1:
            gathered: list[Any] = [None] * self.ranks.world
            dist.all_gather_object(gathered, rng)
        else:
            gathered = [rng]
        if self.ranks.rank:
            return
        state = {
            "config": _plain(self.config),
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
        """Write the averaged weights as `weights.load` reads them."""
        save(folder, self.averaged_model(card), dtype=dtype)

    def averaged_model(self, card: dict[str, Any] | None = None) -> Model:
        m = self.model
        return Model(self.averaged, m.schedule, m.target, m.scale, m.level, m.card if card is None else card)


class Captured:
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


def fresh(config: TrainConfig) -> Model:
    """A model with random weights, of config.seed, as the configuration describes it."""
    torch.manual_seed(config.seed)
    o = FRESH | _given(config)
    unet = UNet(
        channels=o["channels"],
        multipliers=o["multipliers"],
        blocks=o["blocks"],
        attention=o["attention"],
        groups=o["groups"],
        dropout=o["dropout"],
        image_size=config.crop,
        in_channels=2 * o["image_channels"],
        out_channels=o["image_channels"],
        variant=o["variant"],
    )
    schedule = Schedule.named(o["schedule"], o["T"], o["beta_start"], o["beta_end"])
    return Model(unet, schedule, Target(o["target"], o["k"], o["clip"]), o["scale"], o["level"])


def _given(config: TrainConfig) -> dict[str, Any]:
    """The options of the model that are not left to the weights."""
    given = {name: value for name in FRESH if (value := getattr(config, name)) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _agreeing(config: TrainConfig, model: Model) -> Model:
    """The model, its scale known. ValueError where an option that is given is not the model's."""
    network, schedule, given = model.unet.config, model.schedule.config, _given(config)
    # attention is counted from the crop's side, wherever the model counts from
    sides = [config.crop // 2**i for i in range(len(network["multipliers"]))]
    if "attention" in given:
        given["attention"] = tuple(side for side in sides if side in given["attention"])
    has = network | {
        "attention": tuple(sides[i] for i in Structure.of_config(network).attention),
        "image_channels": network["out_channels"],
        "scale": model.scale or config.scale,
        "target": model.target.kind,
        "k": model.target.k,
        "clip": model.target.clip,
        "schedule": schedule.get("name", "betas of its own"),
        "T": model.schedule.T,
        "beta_start": schedule.get("start", model.schedule.betas[0].item()),
        "beta_end": schedule.get("end", model.schedule.betas[-1].item()),
        "level": model.level,
    }
    for name, value in given.items():
        if value != has[name]:
            raise ValueError(f"{name} must be that of the weights, {has[name]!r}, or left out: got {value!r}")
    if has["scale"] is None:
        raise ValueError("these weights do not say how much they enlarge: give the scale")
    return replace(model, scale=has["scale"])


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """lr times a linear rise over the first `warmup` iterations and a linear fall over the last
    `cooldown`.
    """
    rise = min(1.0, (iteration + 1) / max(1, config.warmup))
    fall = min(1.0, (config.iterations - iteration) / config.cooldown) if config.cooldown else 1.0
    return config.lr * rise * fall


# The loop


def train(
    config: TrainConfig, start: Model | None = None, moments: dict[str, dict[str, Tensor]] | None = None
) -> Model:
    """Train as `config` says, on every rank that torchrun started; returns the averaged model.

    start, moments: weights and Adam's state to begin with (see Trainer), from `weights.load`, or from
    `compat.janspiry.model` and `moments`.

    SIGINT and SIGTERM take effect after the iteration, which is saved first (alone, in the main thread); a second
    one at once.

    Raises:
        DataError: data that cannot be trained on, before anything is written.
        ValueError: a configuration that cannot be or contradicts the weights, a device that is not there, or a
            checkpoint that is damaged or of another configuration.
        FileExistsError: `out` holds a run, and resume is off.
        FileNotFoundError: it holds none, and resume is on.
        TrainingError: the loss is not finite, a checkpoint cannot be written, a rank died.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    if (out / CHECKPOINT).exists() and not config.resume:
        raise FileExistsError(f"{out} holds a run: give --resume to go on with it, or another --out")
    if config.warmup > config.iterations:
        warnings.warn(
            f"the run ends within its warmup, and lr never reaches {config.lr:g}: got iterations={config.iterations}, "
            f"warmup={config.warmup}",
            stacklevel=2,
        )
    with _process_group(config):
        return _run(config, start, moments)


def _run(config: TrainConfig, start: Model | None, moments: dict[str, dict[str, Tensor]] | None) -> Model:
    trainer = Trainer(config, start, moments)
    pictures = trainer.pictures(config.data, config.augment)
    held_out = None if config.validation is None else trainer.pictures(config.validation, "none")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    _guarded(trainer, pictures, held_out)
    return trainer.averaged_model()


def _guarded(trainer: Trainer, pictures: Pictures, held_out: Pictures | None) -> None:
    try:
        with _between_iterations(trainer.ranks.world) as signals:
            _loop(trainer, pictures, held_out, signals)
    except RuntimeError as error:
        if trainer.ranks.world > 1 and not isinstance(error, TrainingError) and _is_lost_rank(error):
            raise TrainingError(
                f"a rank died or lost its connection at iteration {trainer.iteration} ({error}): "
                "start all ranks again with --resume, they go on from the last checkpoint"
            ) from error
        raise


@contextlib.contextmanager
def _between_iterations(world: int) -> Iterator[list[int]]:
    """The list of SIGINT and SIGTERM as they come; at the end they strike as they would have. A second one strikes
    at once. With several ranks all do: they would not save at the same iteration.
    """
    signals: list[int] = []
    handlers: dict[int, Any] = {}
    if world == 1 and threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def note(number: int, frame: object) -> None:
        signals.append(number)
        for other, handler in handlers.items():
            signal.signal(other, handler)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in signals:
        signal.raise_signal(number)


def _ignore_interrupts(worker: int) -> None:
    """A process that loads data: what the whole group gets is for the one that trains and may need another batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loop(trainer: Trainer, pictures: Pictures, held_out: Pictures | None, signals: list[int]) -> None:
    config, out = trainer.config, Path(trainer.config.out)
    leader = trainer.ranks.rank == 0
    batches = trainer.batches(pictures)
    images = config.batch_size * trainer.ranks.world
    writer = _tensorboard(out) if config.tensorboard and leader else None
    bar = tqdm(total=config.iterations, initial=trainer.iteration, disable=None if leader else True, unit="it")
    losses, since = [], time.perf_counter()
    while trainer.iteration < config.iterations and not signals:
        losses.append(trainer.step(batches))
        i = trainer.iteration
        bar.update()
        if i % config.log_every == 0 or i == config.iterations:
            seconds = time.perf_counter() - since
            entry = {
                "loss": sum(losses) / len(losses),
                "lr": learning_rate(config, i - 1),
                "images_per_second": len(losses) * images / seconds,
            }
            losses, since = [], time.perf_counter()
            bar.set_postfix(loss=f"{entry['loss']:.4f}", images_s=f"{entry['images_per_second']:.1f}")
            if leader:
                _log(out, i, entry, "train", writer)
        if i % config.save_every == 0 or i == config.iterations:
            trainer.save()
        if held_out and leader and i % config.validate_every == 0 and i < config.iterations:
            _validated(trainer, held_out, writer)
    bar.close()
    if signals:
        trainer.save()
        name = signal.Signals(signals[0]).name
        tqdm.write(f"{name}: iteration {trainer.iteration} is in {out / CHECKPOINT}, --resume goes on from it")
    elif leader:
        rows = _validated(trainer, held_out, writer) if held_out else _validate(trainer, pictures)[1]
        contact_sheet(rows, out / SHEET)
    if writer:
        writer.close()


def _log(out: Path, iteration: int, entry: dict[str, float], name: str, writer: Any) -> None:
    """A line of log.jsonl; None for what is not finite."""
    plain = {key: value if math.isfinite(value) else None for key, value in entry.items()}
    with open(out / LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps({"iteration": iteration, **plain}) + "\n")
    if writer:
        for key, value in entry.items():
            writer.add_scalar(f"{name}/{key}", value, iteration)


def _validated(trainer: Trainer, held_out: Pictures, writer: Any) -> list:
    """The rows of `validate`, its scores told and logged."""
    i = trainer.iteration
    scores, rows = _validate(trainer, held_out)
    tqdm.write(f"iteration {i}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    _log(Path(trainer.config.out), i, scores, "validation", writer)
    if writer:
        for j, row in enumerate(rows):
            writer.add_image(f"validation/{j}", (torch.cat(row, -1).clamp(-1, 1) + 1) / 2, i)
    return rows


def _validate(trainer: Trainer, pictures: Pictures) -> tuple[dict[str, float], list]:
    return validate(trainer.averaged_model(), pictures, trainer.config.validation_steps)


def validate(model: Model, pictures: Pictures, steps: int = 10, count: int = 4) -> tuple[dict[str, float], list]:
    """Mean PSNR, SSIM and consistency of the first `count` pictures by a few-step solver, and the rows
    (x, ours, truth), each [C, H, W]. Of a picture, at most 128 pixels a side.
    """
    device = next(model.unet.parameters()).device
    sampler = Sampler(model.unet, model.schedule, steps=steps, level=model.level, target=model.target)
    scores, rows = [], []
    for index in range(min(count, len(pictures))):
        _, x, truth = pictures.whole(index)
        most = max(128, math.ceil(pictures.scale))
        (height, width), small = image.whole([min(n, most) for n in truth.shape[-2:]], pictures.scale)
        x, truth = x[:, :height, :width], truth[:, :height, :width]
        y = sampler(image.reflect_pad(x, model.unet.multiple)[None].to(device), seed=index)
        assert isinstance(y, Tensor)
        y = y[..., :height, :width].cpu()
        source = image.resize(truth[None], small)
        row = {"psnr": metrics.psnr(y, truth[None]), "consistency": metrics.consistency(y, source)}
        if min(height, width) >= 11:
            row["ssim"] = metrics.ssim(y, truth[None])
        scores.append({name: value.item() for name, value in row.items()})
        rows.append((x, y[0], truth))
    known = {name: [s[name] for s in scores if name in s] for s in scores for name in s}
    return {name: sum(values) / len(values) for name, values in known.items()}, rows


def contact_sheet(rows: list, path: Path) -> None:
    """A PNG of the rows (x, ours, truth), one under the other; nothing where a picture has neither 1 nor 3
    channels.
    """
    if rows[0][0].shape[0] not in (1, 3):
        return
    width = max(x.shape[-1] for x, _, _ in rows)
    strips = [torch.cat([nn.functional.pad(p, (0, width - p.shape[-1]), value=1.0) for p in row], -1) for row in rows]
    image.write(image.to_picture(torch.cat(strips, -2)), path)


# Small things


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return find_device(name)
    device = find_device(f"cuda:{local}")
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _process_group(config: TrainConfig) -> Iterator[None]:
    if Ranks().world == 1:
        yield
        return
    backend = "nccl" if _device(config.device, Ranks().local).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield
    finally:
        # the trainer goes first: a thread of gloo that outlives the interpreter aborts the process
        gc.collect()
        dist.destroy_process_group()


def _is_lost_rank(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection" in text


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration in types that a checkpoint may hold."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for name, v in plain.items()
    }


def _read(config: TrainConfig, world: int) -> dict[str, Any]:
    """What is in out/checkpoint.pt. ValueError where it is damaged or of another configuration."""
    path = Path(config.out) / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist (leave out --resume to start)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ranks = state["config"], len(state["rng"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or no checkpoint of sr3fast train: begin another --out with --init "
            f"{path.parent / EXPORT}, its averaged weights"
        ) from error
    if "description" not in state:
        raise ValueError(
            f"{path} is of an older sr3fast: go on with that one, or begin another --out with --init "
            f"{path.parent / EXPORT}, its averaged weights"
        )
    ours = _plain(config)
    for name in sorted(ours.keys() - FREE - FRESH.keys()):
        if ours[name] != theirs.get(name):
            raise ValueError(
                f"{path} was trained with {name}={theirs.get(name)!r}, not {ours[name]!r}: "
                "give the same flags, or another --out"
            )
    if ranks != world:
        raise ValueError(f"{path} was trained on {ranks} ranks, not {world}: start as many")
    return state


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("--tensorboard needs TensorBoard: pip install 'sr3fast[train]'") from error
    return SummaryWriter(str(out / "tensorboard"))
