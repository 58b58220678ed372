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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
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
from .weights import Model, Target, save

CHECKPOINT, EXPORT, LOG, SHEET = "checkpoint.pt", "model", "log.jsonl", "contact_sheet.png"

# what may differ between a run and its resumption
FREE = {"data", "out", "resume", "iterations", "cooldown", "save_every", "log_every", "device", "workers"}
FREE |= {"threads", "compile", "capture", "tensorboard", "validation", "validate_every", "validation_steps"}


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says where it stopped, what to try, and which checkpoint is
    left.
    """


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the flags of `sr3fast train`."""

    data: Path  # folder of pictures, of hr/ and lr/, Janspiry's folders or LMDB, or a .npy [N, C, H, W]
    out: Path  # folder of the run: checkpoint.pt, model/, log.jsonl
    resume: bool = False  # go on from the checkpoint in `out`
    init: Path | None = None  # weights to begin with (their network and task): a folder, or Janspiry's _gen.pth
    iterations: int = 100_000  # optimizer steps in all, those before --resume included
    batch_size: int = 16  # of one rank and iteration, micro-batches included
    crop: int = 64  # side of a training crop, in pixels of the target
    scale: float = 4.0  # how many times smaller the source is
    lr: float = 1e-4  # learning rate at its highest
    seed: int = 0  # of weights, order, augmentation, noise
    device: str = "auto"  # auto: cuda where there is one, else cpu
    save_every: int = 1000  # iterations between checkpoints

    channels: int = 32  # network: width of the first level (SR3's: 64)
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # network: of the width, a level (SR3's 16 -> 128: 1 2 4 8 8)
    blocks: int = 2  # network: residual blocks a level
    attention: tuple[int, ...] = ()  # network: resolutions with attention, counted from the crop's side
    groups: int = 8  # network: of the norms (SR3's: 32)
    dropout: float = 0.0  # network (SR3's 16 -> 128: 0.2)
    image_channels: int = 3  # network: of the pictures
    variant: str = "sr3"  # network: sr3, told a continuous noise level; ddpm, an integer t

    target: str = "image"  # what y_0 is: image, SR3's own; residual, clip(k (image - x)), SRDiff's
    k: float = 1.0  # of a residual
    clip: float = 1.0  # bound on a residual
    schedule: str = "linear"  # of beta: linear, quad, warmup10, warmup50, const, cosine
    T: int = 2000  # steps of the schedule
    beta_start: float = 1e-6  # the first beta
    beta_end: float = 1e-2  # the last beta
    level: str = "sqrt_gamma"  # what the network is told: sqrt_gamma, gamma, or t (variant ddpm)
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
        for name in (
            "iterations",
            "batch_size",
            "crop",
            "save_every",
            "accumulate",
            "T",
            "log_every",
            "validate_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        for name, choices in (
            ("level", ("sqrt_gamma", "gamma", "t")),
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
        if self.crop % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"the crop must be a multiple of 2^(levels - 1) = {2 ** (len(self.multipliers) - 1)}: got {self.crop}"
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

    config: the run; start: weights to begin with (their network, schedule, target and level are then the
    run's); moments: Adam's state by parameter name, {"step", "exp_avg", "exp_avg_sq"}.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: Model | None = None,
        moments: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        self.config, self.ranks, self.iteration = config, Ranks(), 0
        self.device = _device(config.device, self.ranks.local)
        torch.manual_seed(config.seed)
        if start is None:
            start = fresh(config)
        self.model = start
        self.unet = start.unet.to(self.device, torch.float32).train()
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

    def resume(self) -> None:
        """Go on from out/checkpoint.pt. ValueError where that is of another configuration."""
        path = Path(self.config.out) / CHECKPOINT
        if not path.exists():
            raise FileNotFoundError(f"nothing to resume: {path} does not exist (leave out --resume to start)")
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = _plain(self.config)
        for name in sorted(set(ours) - FREE):
            if ours[name] != state["config"].get(name):
                raise ValueError(
                    f"{path} was trained with {name}={state['config'].get(name)!r}, not {ours[name]!r}: "
                    "give the same flags, or another --out"
                )
        if len(state["rng"]) != self.ranks.world:
            raise ValueError(f"{path} was trained on {len(state['rng'])} ranks, not {self.ranks.world}: start as many")
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
    """A model with random weights, as the configuration describes it."""
    unet = UNet(
        channels=config.channels,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        groups=config.groups,
        dropout=config.dropout,
        image_size=config.crop,
        in_channels=2 * config.image_channels,
        out_channels=config.image_channels,
        variant=config.variant,
    )
    return Model(
        unet,
        Schedule.named(config.schedule, config.T, config.beta_start, config.beta_end),
        Target(config.target, config.k, config.clip),
        config.scale,
        config.level,
    )


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

    start, moments: weights and Adam's state to begin with (see Trainer), from `weights.load` or
    `compat.janspiry`.

    Raises:
        DataError: data that cannot be trained on, before anything is built.
        ValueError: a configuration that cannot be, a device that is not there, or a checkpoint of another
            configuration.
        FileExistsError, FileNotFoundError: `out` holds a run and resume is off; resume is on and it holds
        none. TrainingError: the loss is not finite, a checkpoint cannot be written, a rank died.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    pictures = _pictures(config, config.data, config.augment)
    held_out = None if config.validation is None else _pictures(config, config.validation, "none")
    out = Path(config.out)
    if (out / CHECKPOINT).exists() and not config.resume:
        raise FileExistsError(f"{out} holds a run: give --resume to go on with it, or another --out")
    with _process_group(config):
        return _run(config, pictures, held_out, start, moments)


def _run(
    config: TrainConfig,
    pictures: Pictures,
    held_out: Pictures | None,
    start: Model | None,
    moments: dict[str, dict[str, Tensor]] | None,
) -> Model:
    trainer = Trainer(config, start, moments)
    if config.resume:
        trainer.resume()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    _guarded(trainer, pictures, held_out)
    return trainer.averaged_model()


def _guarded(trainer: Trainer, pictures: Pictures, held_out: Pictures | None) -> None:
    try:
        _loop(trainer, pictures, held_out)
    except RuntimeError as error:
        if trainer.ranks.world > 1 and not isinstance(error, TrainingError) and _is_lost_rank(error):
            raise TrainingError(
                f"a rank died or lost its connection at iteration {trainer.iteration} ({error}): "
                "start all ranks again with --resume, they go on from the last checkpoint"
            ) from error
        raise


def _loop(trainer: Trainer, pictures: Pictures, held_out: Pictures | None) -> None:
    config, out = trainer.config, Path(trainer.config.out)
    leader = trainer.ranks.rank == 0
    batches = trainer.batches(pictures)
    images = config.batch_size * trainer.ranks.world
    writer = _tensorboard(out) if config.tensorboard and leader else None
    bar = tqdm(total=config.iterations, initial=trainer.iteration, disable=None if leader else True, unit="it")
    losses, since = [], time.perf_counter()
    while trainer.iteration < config.iterations:
        losses.append(trainer.step(batches))
        i = trainer.iteration
        bar.update()
        if i % config.log_every == 0 or i == config.iterations:
            seconds = time.perf_counter() - since
            entry = {
                "iteration": i,
                "loss": sum(losses) / len(losses),
                "lr": learning_rate(config, i - 1),
                "images_per_second": len(losses) * images / seconds,
            }
            losses, since = [], time.perf_counter()
            bar.set_postfix(loss=f"{entry['loss']:.4f}", images_s=f"{entry['images_per_second']:.1f}")
            if leader:
                with open(out / LOG, "a", encoding="utf-8") as log:
                    log.write(json.dumps(entry) + "\n")
            if writer:
                for name, value in entry.items():
                    writer.add_scalar(f"train/{name}", value, i)
        if i % config.save_every == 0 or i == config.iterations:
            trainer.save()
        if held_out and leader and (i % config.validate_every == 0 or i == config.iterations):
            scores, rows = validate(trainer.averaged_model(), held_out, config.validation_steps)
            tqdm.write(f"iteration {i}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            if writer:
                for name, value in scores.items():
                    writer.add_scalar(f"validation/{name}", value, i)
                for j, row in enumerate(rows):
                    writer.add_image(f"validation/{j}", (torch.cat(row, -1).clamp(-1, 1) + 1) / 2, i)
    bar.close()
    if leader:
        _, rows = validate(trainer.averaged_model(), held_out or pictures, config.validation_steps)
        contact_sheet(rows, out / SHEET)
    if writer:
        writer.close()


def validate(model: Model, pictures: Pictures, steps: int = 10, count: int = 4) -> tuple[dict[str, float], list]:
    """Mean PSNR, SSIM and consistency of the first `count` pictures by a few-step solver, and the rows
    (x, ours, truth), each [C, H, W]. Pictures are cut to at most 128 pixels a side.
    """
    device = next(model.unet.parameters()).device
    sampler = Sampler(model.unet, model.schedule, steps=steps, level=model.level, target=model.target)
    scores, rows = [], []
    multiple = model.unet.multiple
    for index in range(min(count, len(pictures))):
        _, x, truth = pictures.whole(index)
        side = math.lcm(multiple, round(pictures.scale))
        height, width = (min(n, max(side, 128)) // side * side for n in truth.shape[-2:])
        x, truth = x[:, :height, :width], truth[:, :height, :width]
        y = sampler(x[None].to(device), seed=index)
        assert isinstance(y, Tensor)
        y = y.cpu()
        small = image.resize(truth[None], (round(height / pictures.scale), round(width / pictures.scale)))
        row = {"psnr": metrics.psnr(y, truth[None]), "consistency": metrics.consistency(y, small)}
        if min(height, width) >= 11:
            row["ssim"] = metrics.ssim(y, truth[None])
        scores.append({name: value.item() for name, value in row.items()})
        rows.append((x, y[0], truth))
    mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    return mean, rows


def contact_sheet(rows: list, path: Path) -> None:
    """A PNG of the rows (x, ours, truth), one under the other; nothing where a picture has neither 1 nor 3
    channels.
    """
    if rows[0][0].shape[0] not in (1, 3):
        return
    width = max(x.shape[-1] for x, _, _ in rows)
    strips = [torch.cat([nn.functional.pad(p, (0, width - p.shape[-1]), value=1.0) for p in row], -1) for row in rows]
    image.write(image.to_picture(torch.cat(strips, -2)), path)


# The variational bound


def variational_bound(
    f_theta: Callable[[Tensor | None, Tensor, Tensor], Tensor],
    x: Tensor | None,
    y_0: Tensor,
    schedule: Schedule,
    seed: int = 0,
    *,
    level: str = "sqrt_gamma",
    steps: list[int] | None = None,
) -> dict[str, Any]:
    """The variational bound on -log2 p(y_0 given x), in bits per dimension, averaged over the batch.

        L_T     = KL(q(y_T given y_0), N(0, I))
        L_{t-1} = KL(q(y_{t-1} given y_0, y_t), p_theta(y_{t-1} given y_t, x)), t = T..2, p_theta's variance
        1 - alpha_t L_0     = -log of N(mean_theta(y_1), 1 - alpha_1) over y_0's bin, of 256 on [-1, 1], the
        outer ones open

    One draw of y_t a step. y_0: [B, C, H, W] on the 256 levels (L_0 is only then a probability). steps: the
    t to evaluate, by default all; t = 1 is always among them, and the others are scaled to stand for 2..T.

    Returns {"bits", "prior", "decoder": floats, "kl": {t: float}}, all in bits per dimension. Source: DDPM
    (Ho et al. 2020), sections 2 and 3.3, with SR3's conditioning.
    """
    chosen = sorted(set(range(2, schedule.T + 1) if steps is None else steps) - {1})
    if chosen and not 2 <= chosen[0] <= chosen[-1] <= schedule.T:
        raise ValueError(f"steps must lie in 1..T = {schedule.T}: got {chosen[0]} .. {chosen[-1]}")
    alpha, gamma = schedule.alpha, schedule.gamma
    bits, batch = 1 / math.log(2), len(y_0)
    seeds = noise.seeds(seed, batch, y_0.device)

    def eps_error(t: int) -> tuple[Tensor, Tensor, Tensor]:
        g = gamma[t].item()
        y_t, eps = ops.q_sample(y_0, g, seeds, t)
        told: Tensor
        if level == "t":
            told = torch.full((batch,), t - 1, device=y_0.device)
        else:
            told = torch.full((batch, 1), g if level == "gamma" else math.sqrt(g), device=y_0.device)
        with torch.no_grad():
            return y_t.double(), eps.double(), f_theta(x, y_t, told).double()

    kl = {}
    for t in chosen:
        a, g, g_before = alpha[t].item(), gamma[t].item(), gamma[t - 1].item()
        if a == 1:
            kl[t] = 0.0
            continue
        _, eps, eps_hat = eps_error(t)
        ratio = (1 - g_before) / (1 - g)  # the variances' quotient, posterior's over p_theta's
        mean_error = (1 - a) / (a * (1 - g)) * (eps_hat - eps).square().mean().item()
        kl[t] = bits * 0.5 * (ratio - 1 - math.log(ratio) + mean_error)
    a, g = alpha[1].item(), gamma[1].item()
    y_1, _, eps_hat = eps_error(1)
    mean = (y_1 - (1 - a) / math.sqrt(1 - g) * eps_hat) / math.sqrt(a)
    decoder = -bits * log_bin(y_0.double(), mean, math.sqrt(1 - a)).mean().item()
    g = gamma[-1].item()
    prior = bits * 0.5 * (g * y_0.double().square().mean().item() - g - math.log1p(-g))
    total = sum(kl.values()) * (schedule.T - 1) / max(1, len(kl))
    return {"bits": prior + total + decoder, "prior": prior, "decoder": decoder, "kl": kl}


def log_bin(y: Tensor, mean: Tensor, std: float) -> Tensor:
    """ln of the probability that N(mean, std^2) gives to y's bin [y - 1/255, y + 1/255]; -1's and 1's bins
    are open.
    """
    upper = torch.where(y > 1 - 1 / 255, math.inf, (y + 1 / 255 - mean) / std)
    lower = torch.where(y < -1 + 1 / 255, -math.inf, (y - 1 / 255 - mean) / std)
    # in the left tail, where differences of the distribution function keep their digits
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    high, low = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return high + torch.log1p(-torch.exp((low - high).clamp(max=-1e-300)))


# Small things


def _pictures(config: TrainConfig, data: Path, augment: str) -> Pictures:
    return Pictures(
        open_items(data, config.scale),
        crop=config.crop,
        scale=config.scale,
        channels=config.image_channels,
        augment=augment,
        seed=config.seed,
    )


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


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("--tensorboard needs TensorBoard: pip install 'sr3fast[train]'") from error
    return SummaryWriter(str(out / "tensorboard"))
