"""The command line: `sr3fast upscale photo.jpg`. Each command is a dataclass, its options, and a function."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

    from .image import Photo
    from .upscaling import Upscaler
    from .weights import Model

BAD_INPUT = 2  # exit code, the same as for options that do not parse


class Command(NamedTuple):
    """A dataclass of options, the function that they go to, and what they are where they are not given."""

    options: type
    function: Callable[[Any], int]
    defaults: Callable[[Sequence[str]], Any] = lambda arguments: None


@dataclass(kw_only=True)
class Sampling:
    """Which network, and how it is run: the options that upscale and evaluate share."""

    weights: str = "photo-x4"
    """Weights that ship, a folder with config.json and model.safetensors, or Janspiry's *_gen.pth."""
    config: str | None = None
    """The config of a Janspiry checkpoint, where it cannot be inferred: a name (sr_sr3_64_512) or a JSON file."""
    scale: float | None = None
    """Enlargement; by default the weights' own."""
    steps: int | None = None
    """Network passes a picture; by default the weights' own, else 25."""
    solver: str | None = None
    """sr3, ddpm, ddim, dpm++2m, sde-dpm++2m or unipc2."""
    grid: str | None = None
    """t, logsnr or blend."""
    seed: int = 0
    """The same seed gives the same noise on every machine."""
    tile: int | None = None
    """Largest side of a window in pixels, 0 for none; by default windows of 512 above 1 megapixel."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the network's arithmetic; by default bfloat16 where the device is fastest in it, else float32."""
    device: str | None = None
    """cpu, cuda, cuda:1; by default the GPU if there is one."""
    consistency: bool = False
    """Add up(source - down(result)), against a shift of colours, even if the weights do not ask for it."""
    no_consistency: bool = False
    """Leave that out, even if the weights ask for it."""

    def open(self) -> Upscaler:
        import torch

        from .device import find_device
        from .upscaling import Upscaler

        if self.consistency and self.no_consistency:
            raise ValueError("give --consistency or --no-consistency, not both")
        return Upscaler(
            self.model(),
            scale=self.scale,
            steps=self.steps,
            tile=self.tile,
            solver=self.solver,
            grid=self.grid,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            device=find_device(self.device),
            consistency=self.consistency or (False if self.no_consistency else None),  # None: as the weights say
        )

    def model(self) -> Model:
        return _model(self.weights, self.config, self.scale)


def _model(name: str, config: str | None, scale: float | None) -> Model:
    """The weights of a name that ships, a folder, or a checkpoint of Janspiry's code."""
    if _is_janspirys(name):
        from .compat import janspiry

        return janspiry.model(name, config, scale)
    from . import weights

    if config is not None:
        raise ValueError("--config is for Janspiry's checkpoints: these weights bring their own")
    return weights.load(name)


def _is_janspirys(name: str) -> bool:
    return Path(name).is_file() or Path(f"{name}_gen.pth").is_file()


# ---------------------------------------------------------------------------------------- upscale


@dataclass(kw_only=True)
class Upscale(Sampling):
    """Enlarge pictures.

    A file becomes NAME-x4.png beside it, the pictures of a folder FOLDER-x4/NAME.png. What is there already
    is left as it is; a broken file is reported and passed over, and the exit code at the end is 2.
    """

    inputs: tuple[str, ...]
    """Files, folders or glob patterns."""
    out: Path | None = None
    """Where to write: an image file for one picture, else a folder."""
    overwrite: bool = False
    """Make again what is there already."""
    samples: int = 1
    """Draw several: NAME-1.png, NAME-2.png, ..., NAME-mean.png and NAME-std.png (white: the largest)."""
    trace: Literal["png", "gif", "webp"] | None = None
    """Also save the way from noise to picture, NAME-trace: a strip of y_t (png) or an animation."""

    def written(self, result: Path) -> list[Path]:
        """The files of one picture; the last is written last: where it is, all are."""
        from .jobs import beside

        trace = [] if self.trace is None else [beside(result, "trace").with_suffix(f".{self.trace}")]
        if self.samples == 1:
            return [*trace, result]
        return trace + [beside(result, word) for word in (*map(str, range(1, self.samples + 1)), "std", "mean")]


def upscale(options: Upscale) -> int:
    from tqdm import tqdm

    from .image import ImageError, check_writable
    from .jobs import plan

    if options.samples < 1:
        raise ValueError(f"--samples must be at least 1: got {options.samples}")
    upscaler = options.open()
    jobs = plan(options.inputs, options.out, f"-x{upscaler.scale:g}", options.written)
    for _, result in jobs:
        last = options.written(result)[-1]
        if options.overwrite or not last.exists():
            with _writing(last):
                check_writable(last)
    failed = 0
    with tqdm(jobs, desc="pictures", unit="picture", disable=len(jobs) < 2 or not _on_a_terminal()) as bar:
        for source, result in bar:
            *others, last = options.written(result)
            if last.exists() and not options.overwrite:
                lacking = "".join(f", {file} is not" for file in others if not file.exists())
                tqdm.write(f"{last} is there already{lacking} (--overwrite makes it again)")
                continue
            try:
                _upscale(upscaler, source, result, options)
                tqdm.write(str(last))
            except (ImageError, OSError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE):
                    raise  # of every picture that follows too
                failed += 1
                tqdm.write(_complaint(error, None if isinstance(error, OSError) else source), file=sys.stderr)
    return _failures(failed, len(jobs), "enlarged")


def _upscale(upscaler: Upscaler, source: Path, result: Path, options: Upscale) -> None:
    """One picture, into options.written(result), the last of them last."""
    from . import image
    from .upscaling import Spread, Trace

    photo = _read(source)
    upscaler.check(photo.size)
    image.check_format(result, photo.mode)
    trace = None
    if options.trace is not None:
        trace = Trace(frames=8 if options.trace == "png" else 40)
    samples = options.samples if options.samples > 1 else None
    files = options.written(result)
    trace_file = None if trace is None else files.pop(0)

    def write(i: int, picture: Image.Image) -> None:
        with _writing(files[i]):
            image.write(picture, files[i])

    each = None if samples is None else write  # what is drawn by then is kept
    drawn = upscaler(photo, options.seed, samples=samples, trace=trace, progress=_on_a_terminal(), each=each)
    if trace is not None and trace_file is not None:
        with _writing(trace_file):
            trace.save(trace_file)
    if isinstance(drawn, Spread):
        std = drawn.std.mean(0, keepdim=True)
        write(-2, image.to_picture(std / std.max().clamp(min=1e-6) * 2 - 1))
        write(-1, drawn.mean)
    else:
        write(-1, drawn)


def _read(path: Path) -> Photo:
    from . import image

    try:
        return image.Photo.read(path)
    except OSError as error:
        raise image.ImageError(f"cannot be read: {error.strerror or _line(error)}", path) from error


# --------------------------------------------------------------------------------------- evaluate


@dataclass(kw_only=True)
class Evaluate(Sampling):
    """Measure results against the truth, beside bicubic: PSNR, SSIM, consistency and power spectrum.

    Without --source the sources are made from the truth, by bicubic. With --result finished pictures are
    measured, whoever made them, and no network runs: --source, or --scale, tells how much they were enlarged.
    Pictures of two folders belong together by their names. A picture that cannot be measured, or has no partner,
    is reported and passed over, and the exit code at the end is 2.
    """

    truth: Path
    """A high-resolution picture, or a folder of them with its subfolders."""
    source: Path | None = None
    """The low-resolution picture or folder."""
    result: Path | None = None
    """Finished pictures to measure, of the truth's size."""
    limit: int | None = None
    """Measure the first so many."""
    bits: int | None = None
    """Also the variational bound in bits a dimension, from so many noise levels, 2 to T (T of them: exactly)."""
    json: Path | None = None
    """Also write the numbers here."""


def evaluate(options: Evaluate) -> int:
    from .evaluation import evaluate
    from .image import atomic, check_writable

    if options.json is not None:
        with _writing(options.json):
            check_writable(options.json)
    upscaler = options.open() if options.result is None or options.bits is not None else None
    if upscaler is None and options.source is None and options.scale is None:
        raise ValueError("--result needs --scale, or --source to tell it from: how much the pictures were enlarged")
    found = evaluate(
        options.truth,
        upscaler,
        source=options.source,
        result=options.result,
        scale=options.scale,
        seed=options.seed,
        limit=options.limit,
        bits=options.bits,
        progress=_on_a_terminal(),
    )
    if found.scores:
        print(found)
    for path, error in found.failed.items():
        print(_complaint(error, path), file=sys.stderr)
    if options.json is not None:
        with _writing(options.json), atomic(options.json) as temporary:
            temporary.write_text(json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n")
    return _failures(len(found.failed), len(found.failed) + len(found.scores), "measured")


# ----------------------------------------------------------------------------- the other commands


@dataclass(kw_only=True)
class Info:
    """Which implementation runs each op here, what is built, and why anything was refused."""


def info(options: Info) -> int:
    from . import __version__, backend

    print(f"sr3fast {__version__}")
    print(backend.info())
    return 0


def _train() -> Command:
    from .training import TrainConfig, TrainingError, resumed, train

    @dataclass(frozen=True, kw_only=True)
    class Train(TrainConfig):
        __doc__ = TrainConfig.__doc__

        init: str | None = None
        """Weights to begin with: a name that ships, a folder, or Janspiry's *_gen.pth."""
        config: str | None = None
        """The config of a Janspiry checkpoint, where it cannot be inferred: a name (sr_sr3_64_512) or a JSON file."""

    def run(options: Train) -> int:
        run = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)})
        if options.init is None and options.config is not None:
            raise ValueError("--config is for a checkpoint of Janspiry's that --init names")
        try:
            with _notices():
                train(run, *_begin(options.init, options.config, options.scale))
        except TrainingError as error:
            raise ValueError(str(error)) from error
        return 0

    def defaults(arguments: Sequence[str]) -> Train | None:
        """With --resume, what is not given is as the run has it."""
        known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        known.add_argument("--out")
        known.add_argument("--resume", action="store_true")
        try:
            given, _ = known.parse_known_args(arguments)
        except argparse.ArgumentError:  # tyro will say it
            return None
        asked = given.resume and given.out is not None and not {"-h", "--help"} & set(arguments)
        return Train(**vars(resumed(given.out))) if asked else None

    return Command(Train, run, defaults)


def _begin(init: str | None, config: str | None, scale: float | None) -> tuple[Model | None, Any]:
    """The model, and Adam's state where there is one, that --init names."""
    if init is None:
        return None, None
    model = _model(init, config, scale)
    if not _is_janspirys(init):
        return model, None
    from .compat import janspiry

    try:
        return model, janspiry.moments(init)
    except FileNotFoundError:
        return model, None


COMMANDS: dict[str, tuple[str, Callable[[], Command]]] = {
    "upscale": ("enlarge a picture, a folder or a pattern", lambda: Command(Upscale, upscale)),
    "train": ("train a network on your own pictures", _train),
    "evaluate": ("measure results against the truth, beside bicubic", lambda: Command(Evaluate, evaluate)),
    "info": ("what runs where on this machine", lambda: Command(Info, info)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on stderr and exit code 2."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: sr3fast COMMAND [options]   (sr3fast COMMAND --help lists them)\n")
        print("\n".join(f"  {name:10s} {summary}" for name, (summary, _) in COMMANDS.items()))
        return 0
    if command == "--version":
        from . import __version__

        print(f"sr3fast {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"sr3fast: {command} is none of {', '.join(COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    if "OMP_WAIT_POLICY" not in os.environ:  # beside other programs, threads would spin for one that has no core
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        with _warnings_in_one_line():
            return _run(command, rest)
    except KeyboardInterrupt:
        print("sr3fast: stopped; what was written by then is kept", file=sys.stderr)
        return 130
    except ImportError as error:
        if error.name != "tyro":
            raise
        print("sr3fast: the command line needs tyro: pip install 'sr3fast[cli]'", file=sys.stderr)
    except BrokenPipeError:  # | head; what Python has left to write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of the signal, SIGPIPE
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        print(_complaint(error), file=sys.stderr)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "alloc" not in str(error).lower():
            raise
        print(f"sr3fast: out of memory ({_line(error)[:120]}): use a smaller --tile", file=sys.stderr)
    return BAD_INPUT


def _run(command: str, arguments: Sequence[str]) -> int:
    options, function, defaults = COMMANDS[command][1]()
    if options is Info and not arguments:
        return info(Info())
    import tyro

    if "" in arguments:
        raise ValueError("a name or value is empty: is a variable of the shell unset?")
    config: tuple[Any, ...] = ()
    if issubclass(options, Sampling):  # sr3fast upscale photo.jpg, but sr3fast train --data photos
        config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs)
    parsed: Any = tyro.cli(
        options, default=defaults(arguments), args=list(arguments), prog=f"sr3fast {command}", config=config or None
    )
    return function(parsed)


def _on_a_terminal() -> bool:
    """Whether bars are seen as bars."""
    return sys.stderr is not None and sys.stderr.isatty()


def _failures(failed: int, total: int, done: str) -> int:
    """The exit code; and of several pictures, how many failed."""
    if failed and total > 1:
        print(f"sr3fast: {failed} of {total} pictures could not be {done}", file=sys.stderr)
    return BAD_INPUT if failed else 0


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What cannot be written is told under the user's name for it, not a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or _line(error), str(path)) from error


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Ours, without the place in the code that warns."""
    show = warnings.showwarning

    def notice(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            print(f"sr3fast: {message}", file=sys.stderr)
        else:
            show(message, category, filename, *place)

    with warnings.catch_warnings():
        warnings.showwarning = notice  # type: ignore[assignment]
        yield


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """Pictures that training skips, a line each and their number at the end."""
    from tqdm import tqdm

    from .data import Skipped

    show, count = warnings.showwarning, 0

    def notice(message: Warning | str, category: type[Warning], *place: Any) -> None:
        nonlocal count
        if not issubclass(category, Skipped):
            return show(message, category, *place)
        count += 1
        tqdm.write(f"sr3fast: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Skipped)
        warnings.showwarning = notice  # type: ignore[assignment]
        try:
            yield
        finally:
            if count:
                print(f"sr3fast: pictures skipped: {count}", file=sys.stderr)


def _complaint(error: BaseException, source: Path | None = None) -> str:
    """One line that names the file."""
    text = _line(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if source is not None and getattr(error, "path", None) is None and str(source) not in text.split(": ")[0]:
        text = f"{source}: {text}"
    return f"sr3fast: {text}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
