"""A run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..schedule import whole_number

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
CHOICES: dict[str, tuple[Any, ...]] = {
    "p_gamma": ("gamma", "sqrt_gamma"),
    "t_per": ("sample", "batch"),
    "p": (1, 2),
    "optimizer": tuple(OPTIMIZERS),
    "dtype": (None, "bfloat16", "float32"),
    "augment": ("none", "flip", "dihedral"),
}
# whole numbers, and the least that each may be
AT_LEAST = dict.fromkeys(("iterations", "batch_size", "crop", "accumulate", "validation_steps"), 1)
AT_LEAST |= dict.fromkeys(("save_every", "log_every", "validate_every"), 1)
AT_LEAST |= dict.fromkeys(("seed", "warmup", "cooldown", "workers", "threads"), 0)


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
    resume: bool = False  # go on from the checkpoint in `out`; on the command line, with the run's own options
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
    level: str | None = None  # model: what it is told: sqrt_gamma (new), gamma, or t (new, of variant ddpm)

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
    dtype: str | None = None  # bfloat16, of products alone (autocast), or float32; by default what is faster there

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
        for name, least in AT_LEAST.items():
            whole_number(name, getattr(self, name), least)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}: got {getattr(self, name)!r}")
        if self.seed >= 1 << 32:
            raise ValueError(f"seed must be below 2^32, each has 2^32 noises of its own: got {self.seed}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch: got batch_size={self.batch_size}, accumulate={self.accumulate}"
            )
        if not self.lr > 0 or not 0 <= self.ema < 1:
            raise ValueError(f"lr must be above 0 and ema in [0, 1): got lr={self.lr}, ema={self.ema}")
        if not self.max_norm >= 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"max_norm and weight_decay must be at least 0: got {self.max_norm} and {self.weight_decay}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1): got {self.betas}")


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """lr at an iteration, counted from 0: it rises linearly over the first `warmup` and falls linearly over the last
    `cooldown`.
    """
    rise = min(1.0, (iteration + 1) / max(1, config.warmup))
    fall = min(1.0, (config.iterations - iteration) / config.cooldown) if config.cooldown else 1.0
    return config.lr * rise * fall


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration in types that a checkpoint may hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):  # wherever the run goes on from
            return str(value.absolute())
        return list(value) if isinstance(value, tuple) else value

    return {f.name: plain(getattr(config, f.name)) for f in fields(config)}


def of_plain(values: dict[str, Any]) -> TrainConfig:
    """What `as_plain` made plain. Options that are not of this version are left out."""
    typed = {f.name: values[f.name] for f in fields(TrainConfig) if f.name in values}
    paths = {name: Path(typed[name]) for name in ("data", "out", "validation") if typed.get(name) is not None}
    tuples = {name: tuple(value) for name, value in typed.items() if isinstance(value, list)}
    return TrainConfig(**typed | paths | tuples)
