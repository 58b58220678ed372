"""The loop around the iterations: checkpoints, the log, validation."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import image
from ..data import Pictures
from ..weights import Model
from .config import TrainConfig, TrainingError, learning_rate
from .ranks import Ranks, between_iterations, is_lost_rank, process_group, undisturbed
from .trainer import CHECKPOINT, EXPORT, Trainer
from .validation import contact_sheet, validate

LOG, SHEET = "log.jsonl", "contact_sheet.png"


def train(
    config: TrainConfig, start: Model | None = None, moments: dict[str, dict[str, Tensor]] | None = None
) -> Model:
    """Train as `config` says, on every rank that torchrun started; returns the averaged model.

    start, moments: weights and Adam's state to begin with (see Trainer), from `weights.load`, or from
    `compat.janspiry.model` and `moments`.

    SIGINT, SIGTERM and SIGHUP, of any rank, take effect after the iteration, which is saved first (in the main thread);
    of a process that trains alone, a second one takes effect at once.

    Raises:
        DataError: data that cannot be trained on, before anything is written.
        ValueError: a configuration that cannot be or contradicts the weights, a device that is not there, or a
            checkpoint that is damaged or of another configuration.
        FileExistsError: `out` holds a run, and resume is off.
        FileNotFoundError: it holds none, and resume is on.
        TrainingError: the loss is not finite, a checkpoint cannot be written, a rank died.
    """
    out = Path(config.out)
    if (out / CHECKPOINT).exists() and not config.resume:
        raise FileExistsError(f"{out} holds a run: give --resume to go on with it, or another --out")
    if config.warmup > config.iterations:
        warnings.warn(
            f"the run ends within its warmup, and lr never reaches {config.lr:g}: got iterations={config.iterations}, "
            f"warmup={config.warmup}",
            stacklevel=2,
        )
    with process_group(config.device), global_state(config):
        return run(config, start, moments)


@contextlib.contextmanager
def global_state(config: TrainConfig) -> Iterator[None]:
    """torch's threads, as many as config says; they and its random numbers are the caller's again afterwards."""
    before, device = torch.get_num_threads(), Ranks().device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_num_threads(config.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def run(config: TrainConfig, start: Model | None, moments: dict[str, dict[str, Tensor]] | None) -> Model:
    trainer = Trainer(config, start, moments)
    pictures = trainer.pictures(config.data, config.augment)
    held_out = None if config.validation is None else trainer.pictures(config.validation, "none")
    for folder, found in ((config.data, pictures), (config.validation, held_out)):
        if found is not None and folder is not None and not config.resume:
            check_apart(Path(config.out), Path(folder), found)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    try:
        with between_iterations(trainer.ranks.world) as signals:
            loop(trainer, pictures, held_out, signals)
    except RuntimeError as error:
        if trainer.ranks.world > 1 and not isinstance(error, TrainingError) and is_lost_rank(error):
            raise TrainingError(
                f"a rank died or lost its connection at iteration {trainer.iteration} ({error}): "
                "start all ranks again with --resume, they go on from the last checkpoint"
            ) from error
        raise
    return trainer.averaged_model()


def check_apart(out: Path, folder: Path, pictures: Pictures) -> None:
    """ValueError where a run lies in a folder whose pictures, with those in its subfolders, are the data."""
    out, within = out.resolve(), folder.resolve()
    lists_all = folder.is_dir() and pictures.items[0].source is None
    hidden = out.is_relative_to(within) and any(part[0] == "." for part in out.relative_to(within).parts)
    if lists_all and out.is_relative_to(within) and not hidden:
        raise ValueError(f"out must not lie in a folder of pictures, {folder}: its contact sheet would be one")


def loop(trainer: Trainer, pictures: Pictures, held_out: Pictures | None, signals: list[int]) -> None:
    config, out = trainer.config, Path(trainer.config.out)
    leader = trainer.ranks.rank == 0
    batches = trainer.batches(pictures)
    images = config.batch_size * trainer.ranks.world
    writer = tensorboard(out) if config.tensorboard and leader else None
    if leader:
        forget(out, trainer.iteration)
    bar = tqdm(total=config.iterations, initial=trainer.iteration, disable=None if leader else True, unit="it")
    if trainer.iteration >= config.iterations and leader:
        say(f"iteration {trainer.iteration} is reached already: --iterations says how many in all")
    losses, since = [], time.perf_counter()
    stop = 0  # the number of a signal
    while trainer.iteration < config.iterations and not stop:
        losses.append(trainer.step(batches))
        i = trainer.iteration
        with contextlib.suppress(OSError):  # nobody looks on any more
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
                log(out, i, entry, "train", writer)
            if leader and bar.disable:  # no terminal
                say(f"iteration {i}: loss {entry['loss']:.4f}, {entry['images_per_second']:.1f} images a second")
        if i % config.save_every == 0 or i == config.iterations:
            trainer.save()
        if held_out and leader and i % config.validate_every == 0 and i < config.iterations:
            log_validation(trainer, held_out, writer)
        stop = trainer.ranks.largest(signals[0] if signals else 0, trainer.device)
    bar.close()
    if stop:
        with undisturbed():
            trainer.save()
        signals[:] = [stop]  # whichever rank it came to
        name, i = signal.Signals(stop).name, trainer.iteration
        if leader:
            say(f"{name}: iteration {i} is in {out / CHECKPOINT}, --resume goes on from it")
    elif leader:
        rows = log_validation(trainer, held_out, writer) if held_out else validation(trainer, pictures)[1]
        contact_sheet(rows, out / SHEET)
        say(f"iteration {trainer.iteration}: the weights are in {out / EXPORT}")
    if writer:
        writer.close()


def say(text: str) -> None:
    """A line beside the bar. Where nobody reads it any more, training goes on."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError):
        tqdm.write(text)
        sys.stdout.flush()


def forget(out: Path, iteration: int) -> None:
    """Drop the lines of log.jsonl after an iteration: what a run logged beyond its last checkpoint comes again. And
    those that are not whole, as a crash leaves the last one.
    """
    if not (out / LOG).exists():
        return

    def stays(line: str) -> bool:
        try:
            return json.loads(line)["iteration"] <= iteration
        except (ValueError, LookupError, TypeError):
            return False

    lines = (out / LOG).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    with image.atomic(out / LOG) as temporary:
        temporary.write_text("".join(filter(stays, lines)), encoding="utf-8")


def log(out: Path, iteration: int, entry: dict[str, float], name: str, writer: Any) -> None:
    """A line of log.jsonl; None for what is not finite."""
    plain = {key: value if math.isfinite(value) else None for key, value in entry.items()}
    with open(out / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps({"iteration": iteration, **plain}) + "\n")
    if writer:
        for key, value in entry.items():
            writer.add_scalar(f"{name}/{key}", value, iteration)


def log_validation(trainer: Trainer, held_out: Pictures, writer: Any) -> list:
    """The rows of `validate`, its scores told and logged."""
    i = trainer.iteration
    scores, rows = validation(trainer, held_out)
    say(f"iteration {i}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    log(Path(trainer.config.out), i, scores, "validation", writer)
    if writer:
        for j, row in enumerate(rows):
            writer.add_image(f"validation/{j}", (torch.cat(row, -1).clamp(-1, 1) + 1) / 2, i)
    return rows


def validation(trainer: Trainer, pictures: Pictures) -> tuple[dict[str, float], list]:
    return validate(trainer.averaged_model(), pictures, trainer.config.validation_steps)


def tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("--tensorboard needs TensorBoard: pip install 'sr3fast[train]'") from error
    return SummaryWriter(str(out / "tensorboard"))
