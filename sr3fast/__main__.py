"""The command line: `sr3fast upscale photo.jpg`. Each command is a dataclass, its options, and a function."""

from __future__ import annotations

import glob
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from .image import Photo
    from .upscaling import Upscaler
    from .weights import Model

BAD_INPUT = 2  # exit code, the same as for options that do not parse
BICUBIC, OURS = "bicubic", "result"


@dataclass(kw_only=True)
class Weights:
    """Which network, and how it is run: the options that upscale and evaluate share."""

    weights: str = "photo-x4"
    """Weights that ship, a folder with config.json and model.safetensors, or Janspiry's *_gen.pth."""
    config: str | None = None
    """The config of a Janspiry checkpoint where it cannot be inferred, by name: sr_sr3_64_512."""
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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network's arithmetic."""
    device: str | None = None
    """cpu, cuda, cuda:1; by default the GPU if there is one."""
    consistency: bool = False
    """Add up(source - down(result)), against a shift of colours, even if the weights do not ask for it."""

    def open(self) -> Upscaler:
        import torch

        from .upscaling import Upscaler

        return Upscaler(
            self.model(),
            scale=self.scale,
            steps=self.steps,
            tile=self.tile,
            solver=self.solver,
            grid=self.grid,
            dtype=getattr(torch, self.dtype),
            device=_device(self.device),
            consistency=self.consistency or None,  # None: as the weights say
        )

    def model(self) -> Model:
        from . import weights

        if not (Path(self.weights).is_file() or Path(f"{self.weights}_gen.pth").is_file()):
            if self.config is not None:
                raise ValueError("--config is for Janspiry's checkpoints: these weights bring their own")
            return weights.load(self.weights)
        from .compat import janspiry

        unet, schedule = janspiry.load(self.weights, config=self.config)
        level = "t" if unet.variant == "ddpm" else "sqrt_gamma"
        sides = re.search(r"_(\d+)_(\d+)$", Path(self.config).stem if self.config else "")  # sr_sr3_16_128
        scale = int(sides[2]) / int(sides[1]) if sides else self.scale
        return weights.Model(unet, schedule, scale=scale, level=level)


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not there ({_line(error)}): use --device cpu") from error
    return device


# ---------------------------------------------------------------------------------------- upscale


@dataclass(kw_only=True)
class Upscale(Weights):
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


def upscale(options: Upscale) -> int:
    from tqdm import tqdm

    from .image import ImageError

    if options.samples < 1:
        raise ValueError(f"--samples must be at least 1: got {options.samples}")
    upscaler = options.open()
    jobs = plan(options.inputs, options.out, f"-x{upscaler.scale:g}")
    failed = 0
    with tqdm(jobs, desc="pictures", unit="picture", disable=len(jobs) < 2) as bar:
        for source, result in bar:
            last = result if options.samples == 1 else _beside(result, "mean")
            if last.exists() and not options.overwrite:
                tqdm.write(f"{last} is there already (--overwrite makes it again)")
                continue
            try:
                _upscale(upscaler, source, result, options)
                tqdm.write(str(last))
            except ImageError as error:
                failed += 1
                tqdm.write(_complaint(error, source), file=sys.stderr)
    if failed and len(jobs) > 1:
        print(f"sr3fast: {failed} of {len(jobs)} pictures could not be enlarged", file=sys.stderr)
    return BAD_INPUT if failed else 0


def _upscale(upscaler: Upscaler, source: Path, result: Path, options: Upscale) -> None:
    """One picture; `result`, or the mean of samples, is written last: where it is, all is."""
    from . import image
    from .upscaling import Spread, Trace

    picture = _read(source)
    upscaler.check(picture.size)
    image.check_format(result, image.Photo.of(picture).mode)
    trace = None
    if options.trace is not None:
        trace = Trace(frames=8 if options.trace == "png" else 40)
    samples = options.samples if options.samples > 1 else None
    drawn = upscaler(picture, options.seed, samples=samples, trace=trace, progress=True)
    if trace is not None:
        trace.save(_beside(result, "trace").with_suffix(f".{options.trace}"))
    if not isinstance(drawn, Spread):
        return image.write(drawn, result)
    for i, one in enumerate(drawn.pictures, 1):
        image.write(one, _beside(result, str(i)))
    std = drawn.std.mean(0, keepdim=True)
    image.write(image.to_picture(std / std.max().clamp(min=1e-6) * 2 - 1), _beside(result, "std"))
    image.write(drawn.mean, _beside(result, "mean"))


def _read(path: Path) -> Any:
    from . import image

    try:
        return image.read(path)
    except OSError as error:
        raise image.ImageError(f"{path}: cannot be read: {error.strerror or _line(error)}") from error


def plan(inputs: Sequence[str], out: Path | None, suffix: str) -> list[tuple[Path, Path]]:
    """(source, result) for files, folders and patterns; results of an earlier run are no sources of this one.

    Raises ValueError where there is nothing, or where `out` is a file for several pictures.
    """
    from PIL import Image

    if not inputs:
        raise ValueError("nothing to enlarge: give files, folders or patterns")
    known = Image.registered_extensions()
    jobs: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
            if not files:
                raise ValueError(f"{path}: no pictures in this folder")
            folder = out or path.resolve().with_name(path.resolve().name + suffix)
            pairs = [(p, folder / p.relative_to(path)) for p in files if not p.name.startswith(".")]
            jobs |= dict(_distinct(pairs, ""))
            continue
        files = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        if not files:
            raise ValueError(f"{name}: no such file or folder")
        files = [p for p in files if p.is_file()]
        jobs |= dict(_distinct([(p, (out or p.parent) / p.name) for p in files], "" if out else suffix))
    made = set(jobs.values())
    jobs = {source: result for source, result in jobs.items() if source not in made}
    if out is not None and out.suffix.lower() in known and not out.is_dir():
        if len(jobs) != 1:
            raise ValueError(f"--out {out} is one file for {len(jobs)} pictures: give a folder")
        jobs = {source: out for source in jobs}
    return list(jobs.items())


def _distinct(pairs: list[tuple[Path, Path]], suffix: str) -> Iterator[tuple[Path, Path]]:
    """Results NAME + suffix + .png; the whole name is kept where a.jpg and a.png would become one."""
    stems = [result.with_suffix("") for _, result in pairs]
    for (source, result), stem in zip(pairs, stems, strict=True):
        name = result.stem if stems.count(stem) == 1 else result.name
        yield source, result.with_name(f"{name}{suffix}.png")


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


# --------------------------------------------------------------------------------------- evaluate


@dataclass(kw_only=True)
class Evaluate(Weights):
    """Measure results against the truth, beside bicubic: PSNR, SSIM, consistency and power spectrum.

    Without --source the sources are made from the truth, by bicubic. With --result finished pictures are
    measured, whoever made them, and no network runs. Pictures of two folders belong together by their names.
    """

    truth: Path
    """A high-resolution picture, or a folder of them."""
    source: Path | None = None
    """The low-resolution picture or folder."""
    result: Path | None = None
    """Finished pictures to measure."""
    limit: int | None = None
    """Measure the first so many."""
    bits: int | None = None
    """Also the variational bound in bits a dimension, from so many noise levels (T of them: exactly)."""
    json: Path | None = None
    """Also write the numbers here."""


class Scores(NamedTuple):
    """PSNR in decibels, SSIM, consistency (MSE on [0, 1], times 1e5) and spectral distance in decibels."""

    psnr: float
    ssim: float
    consistency: float
    spectrum: float


def evaluate(options: Evaluate) -> int:
    from tqdm import tqdm

    upscaler = options.open() if options.result is None or options.bits is not None else None
    scale = upscaler.scale if upscaler else options.scale or 4.0
    truths = _pictures(options.truth)
    sources = _partners(truths, options.source)
    results = _partners(truths, options.result)
    names = list(truths)[: options.limit]
    table: dict[str, dict[str, Scores]] = {}
    bound = 0.0
    for name in tqdm(names, desc="pictures", unit="picture", disable=len(names) < 2):
        high, low = _pair(truths[name], sources.get(name), scale)
        made = _made(results[name], high.size) if results else _upscaled(upscaler, low, options.seed)
        bicubic = low.resized(high.size)
        table[name] = {BICUBIC: _scores(bicubic, high, low), OURS: _scores(made, high, low)}
        if options.bits is not None:
            bound += _bits(upscaler, high, low, options) / len(names)
    if len(names) > 1:
        columns = {who: zip(*(scores[who] for scores in table.values()), strict=True) for who in (BICUBIC, OURS)}
        table["mean"] = {who: Scores(*(sum(c) / len(names) for c in column)) for who, column in columns.items()}

    print(f"{'':24s} {'':8s} {'PSNR dB':>8s} {'SSIM':>7s} {'consistency e-5':>16s} {'spectrum dB':>12s}")
    for name, scores in table.items():
        for who, s in scores.items():
            numbers = f"{s.psnr:8.2f} {s.ssim:7.4f} {s.consistency:16.2f} {s.spectrum:12.2f}"
            print(f"{name[-24:]:24s} {who:8s} {numbers}")
    if options.bits is not None:
        print(f"\nvariational bound: {bound:.4f} bits a dimension")
    if options.json is not None:
        from .image import atomic

        tree: dict[str, Any] = {name: {who: s._asdict() for who, s in scores.items()} for name, scores in table.items()}
        if options.bits is not None:
            tree["bits a dimension"] = bound
        with atomic(options.json) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n")
    return 0


def _pair(truth: Path, source: Path | None, scale: float) -> tuple[Photo, Photo]:
    """The truth, cut to a whole multiple of its source, and the source: read, or made by bicubic."""
    from . import image

    high = image.Photo(image.Photo.of(_read(truth)).color)
    if source is None:
        small = (int(high.size[0] / scale), int(high.size[1] / scale))
        if min(small) < 2:
            raise image.ImageError(f"{truth}: {high.size[0]} x {high.size[1]} is too small to be a truth")
        high = image.Photo(high.color.crop((0, 0, round(small[0] * scale), round(small[1] * scale))))
        return high, high.resized(small)
    low = image.Photo(image.Photo.of(_read(source)).color)
    size = (round(low.size[0] * scale), round(low.size[1] * scale))
    if any(not 0 <= have - need < scale for have, need in zip(high.size, size, strict=True)):
        raise image.ImageError(
            f"{source}: {low.size[0]} x {low.size[1]}, {scale:g} times larger, is not the size of {truth}, "
            f"{high.size[0]} x {high.size[1]}"
        )
    return image.Photo(high.color.crop((0, 0, *size))), low


def _made(path: Path, size: tuple[int, int]) -> Photo:
    from . import image

    picture = image.Photo.of(_read(path)).color
    if picture.width < size[0] or picture.height < size[1]:
        raise image.ImageError(
            f"{path}: {picture.width} x {picture.height} is smaller than the truth, {size[0]} x {size[1]}"
        )
    return image.Photo(picture.crop((0, 0, *size)))


def _upscaled(upscaler: Upscaler | None, low: Photo, seed: int) -> Photo:
    from PIL import Image

    from . import image

    assert upscaler is not None  # opened where there are no results
    drawn = upscaler(low.with_color(low.tensor()), seed)
    assert isinstance(drawn, Image.Image)  # not a Spread: samples= was not given
    return image.Photo.of(drawn)


def _bits(upscaler: Upscaler | None, high: Photo, low: Photo, options: Evaluate) -> float:
    """The variational bound on -log2 p(truth given source)."""
    from . import image
    from .training import variational_bound

    assert upscaler is not None and options.bits is not None
    model = upscaler.model
    if model.target.kind != "image":
        raise ValueError("--bits needs weights whose target is the image: a residual is on no 256 levels")
    if not 1 <= options.bits <= model.schedule.T:
        raise ValueError(f"--bits must lie in 1..T = {model.schedule.T}: got {options.bits}")
    pictures = (low.resized(high.size), high)
    x, y_0 = (
        image.reflect_pad(p.tensor(upscaler.channels)[None], model.unet.multiple).to(upscaler.device) for p in pictures
    )
    steps = [1 + round(i * (model.schedule.T - 1) / max(1, options.bits - 1)) for i in range(options.bits)]
    bound = variational_bound(upscaler.tiled, x, y_0, model.schedule, options.seed, level=model.level, steps=steps)
    return bound["bits"]


def _scores(picture: Photo, truth: Photo, source: Photo) -> Scores:
    from . import metrics

    y, y_0, small = (photo.tensor(3)[None] for photo in (picture, truth, source))
    spectrum = metrics.spectral_distance(y, y_0).item() if min(y.shape[2:]) >= 64 else float("nan")
    consistency = metrics.consistency(y, small).item() * 1e5
    return Scores(metrics.psnr(y, y_0).item(), metrics.ssim(y, y_0).item(), consistency, spectrum)


def _pictures(path: Path) -> dict[str, Path]:
    from PIL import Image

    if path.is_file():
        return {path.stem: path}
    known = Image.registered_extensions()
    files = {p.stem: p for p in sorted(path.glob("*")) if p.suffix.lower() in known}
    if not files:
        raise ValueError(f"{path}: no pictures here")
    return files


def _partners(truths: dict[str, Path], path: Path | None) -> dict[str, Path]:
    if path is None:
        return {}
    partners = _pictures(path)
    if path.is_file() and len(truths) == 1:
        return {name: path for name in truths}
    missing = [name for name in truths if name not in partners]
    if missing:
        raise ValueError(f"{path}: no partner for {missing[0]} ({len(missing)} of {len(truths)} are missing)")
    return partners


# ----------------------------------------------------------------------------- the other commands


@dataclass(kw_only=True)
class Info:
    """Which implementation runs each op here, what is built, and why anything was refused."""


def info(options: Info) -> int:
    from . import __version__, backend

    print(f"sr3fast {__version__}")
    print(backend.info())
    return 0


def _train() -> tuple[type, Callable[[Any], Any]]:
    from .training import TrainConfig, TrainingError, train

    def run(config: TrainConfig) -> int:
        try:
            train(config, *_begin(config.init, config.scale))
        except TrainingError as error:
            raise ValueError(str(error)) from error
        return 0

    return TrainConfig, run


def _begin(path: Path | None, scale: float) -> tuple[Any, Any]:
    """The model, and Adam's state where there is one, that --init names."""
    if path is None:
        return None, None
    from . import weights
    from .compat import janspiry

    if path.is_dir() or str(path) in weights.shipped():
        return weights.load(path), None
    unet, schedule = janspiry.load(path)
    level = "t" if unet.variant == "ddpm" else "sqrt_gamma"
    try:
        moments = janspiry.moments(path)
    except FileNotFoundError:
        moments = None
    return weights.Model(unet, schedule, scale=scale, level=level), moments


COMMANDS: dict[str, tuple[str, Callable[[], tuple[type, Callable[[Any], Any]]]]] = {
    "upscale": ("enlarge a picture, a folder or a pattern", lambda: (Upscale, upscale)),
    "train": ("train a network on your own pictures", _train),
    "evaluate": ("measure results against the truth, beside bicubic", lambda: (Evaluate, evaluate)),
    "info": ("what runs where on this machine", lambda: (Info, info)),
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
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print("sr3fast: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except ImportError as error:
        if error.name != "tyro":
            raise
        print("sr3fast: the command line needs tyro: pip install 'sr3fast[cli]'", file=sys.stderr)
    except BrokenPipeError:  # | head
        return 0
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        print(_complaint(error), file=sys.stderr)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "alloc" not in str(error).lower():
            raise
        print(f"sr3fast: out of memory ({_line(error)[:120]}): use a smaller --tile", file=sys.stderr)
    return BAD_INPUT


def _run(command: str, arguments: Sequence[str]) -> int:
    options, function = COMMANDS[command][1]()
    if options is Info and not arguments:
        return info(Info())
    import tyro

    config: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff,)
    if issubclass(options, Weights):  # sr3fast upscale photo.jpg, but sr3fast train --data photos
        config += (tyro.conf.PositionalRequiredArgs,)
    parsed: Any = tyro.cli(options, args=list(arguments), prog=f"sr3fast {command}", config=config)
    return function(parsed)


def _complaint(error: BaseException, source: Path | None = None) -> str:
    """One line that names the file."""
    text = _line(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if source is not None and str(source) not in text:
        text = f"{source}: {text}"
    return f"sr3fast: {text}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
