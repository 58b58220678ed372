"""Results against the truth, beside bicubic: PSNR, SSIM, consistency and power spectrum of whole folders.

print(evaluate("truth"))                                   upscale, then measure
print(evaluate("truth", source="small", result="made"))   measure what anyone made
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from . import image, metrics
from .bound import variational_bound
from .image import ImageError, Photo
from .upscaling import Tiled, Upscaler
from .weights import Model

__all__ = ["BICUBIC", "RESULT", "Evaluation", "Scores", "evaluate", "pictures", "stems"]

BICUBIC, RESULT = "bicubic", "result"
SPECTRUM_SIDE = 64  # pixels of 32 rings


class Scores(NamedTuple):
    """What is measured of one picture, or the mean over several; see `metrics`."""

    psnr: float
    """Decibels."""
    ssim: float | None
    """None below 11 pixels a side."""
    consistency: float
    """MSE between the shrunk picture and the source, on [0, 1], times 1e5."""
    spectrum: float | None
    """Distance from the truth's power spectrum in decibels; None below 64 pixels a side."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; str() of it is a table."""

    scores: dict[str, dict[str, Scores]]
    """Of each picture, by its name: "bicubic" and "result"."""
    bits: float | None
    """The mean variational bound in bits a dimension, where it was asked for."""
    failed: dict[Path, Exception]
    """The truths that could not be measured, and why."""

    @property
    def mean(self) -> dict[str, Scores]:
        """Over the pictures; of none, empty."""
        if not self.scores:
            return {}
        columns = {who: zip(*(s[who] for s in self.scores.values()), strict=True) for who in (BICUBIC, RESULT)}
        return {who: Scores(*map(_mean, column)) for who, column in columns.items()}

    def __str__(self) -> str:
        rows = [*self.scores.items()]
        if len(rows) > 1:
            rows.append(("mean", self.mean))
        lines = [f"{'':24s} {'':8s} {'PSNR dB':>8s} {'SSIM':>7s} {'consistency e-5':>16s} {'spectrum dB':>12s}"]
        for name, scores in rows:
            for who, s in scores.items():
                numbers = map(_number, s, (8, 7, 16, 12), (2, 4, 2, 2))
                lines.append(" ".join((f"{name[-24:]:24s} {who:8s}", *numbers)))
        if any(None in s for scores in self.scores.values() for s in scores.values()):
            lines.append(f"-: SSIM needs sides of {metrics.SSIM_SIDE} pixels, the spectrum of {SPECTRUM_SIDE}")
        if self.bits is not None:
            lines.append(f"\nvariational bound: {self.bits:.4f} bits a dimension")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able; what is not finite, such as the PSNR of equal pictures, is None."""
        return {
            "pictures": {name: _plain(scores) for name, scores in self.scores.items()},
            "mean": _plain(self.mean),
            "bits a dimension": self.bits,
            "failed": {str(path): str(error) for path, error in self.failed.items()},
        }


def evaluate(
    truth: str | Path,
    upscaler: Upscaler | Model | str | Path | None = None,
    *,
    source: str | Path | None = None,
    result: str | Path | None = None,
    scale: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    bits: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure results against the truth, beside bicubic.

    Args:
        truth: a high-resolution picture, or a folder of them with its subfolders. Cut to a whole multiple of
            its source.
        upscaler: makes the results: an Upscaler, or a model as `upscale` takes it, by default photo-x4 (unless `result`
            is given).
        source: the low-resolution pictures, by the truth's names; by default the truth is shrunk by bicubic.
        result: finished pictures, by the truth's names, or NAME-mean of several samples; no network runs. Of the
            truth's size, before or after it is cut.
        scale: how much finished pictures were enlarged, by default what the sizes of truth and source tell; an
            upscaler brings its own.
        seed: of every picture.
        limit: measure the first so many.
        bits: also the variational bound, from so many noise levels, 2 to T (T of them: exactly); needs an upscaler,
            whose network runs in its weights' own dtype.
        progress: show a bar over the pictures.

    Raises:
        ValueError: nothing there, no picture with a partner, an option out of its range.

    A picture that cannot be measured, or has no partner, is among `failed`; the others go on.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1: got {limit}")
    if not isinstance(upscaler, Upscaler) and not (upscaler is None and result is not None):
        upscaler = Upscaler("photo-x4" if upscaler is None else upscaler)
    bound = None if bits is None else _bound(upscaler, bits, seed)
    if upscaler is None and scale is None and source is None:
        raise ValueError("finished pictures need scale, how much they were enlarged, or source to tell it from")
    if upscaler is None and scale is not None and not scale >= 1:
        raise ValueError(f"scale must be at least 1: got {scale}")
    truths = pictures(truth)
    sources = _partners(truths, source)
    if upscaler is not None:
        if scale not in (None, upscaler.scale):
            raise ValueError(f"the scale is the upscaler's, {upscaler.scale:g}, or left out: got {scale:g}")
        scale = upscaler.scale
    elif scale is None:
        scale = _scale_of((truths[name], sources[name]) for name in truths if name in sources)
    results = _partners(truths, result, means=True)
    scores: dict[str, dict[str, Scores]] = {}
    failed: dict[Path, Exception] = {}
    bounds = []
    measured = dict(islice(truths.items(), limit))
    bar = tqdm(measured.items(), desc="pictures", unit="picture", disable=not progress or len(measured) < 2)
    for name, path in bar:
        try:
            whole = _color(path)
            low_path = None if source is None else _partner(name, path, sources, source)
            high, low = _pair(path, whole, low_path, scale)
            if result is None:
                assert upscaler is not None
                made = _upscaled(upscaler, low, seed)
            else:
                made = _finished(_partner(name, path, results, result), whole.size, high.size)
            row = {BICUBIC: _scores(low.resized(high.size), high, low), RESULT: _scores(made, high, low)}
            if bound is not None:
                bounds.append(bound(high, low))
            scores[name] = row
        except (ImageError, OSError) as error:
            failed[path] = error
    return Evaluation(scores, _mean(bounds), failed)


# --------------------------------------------------------------------------------------- the pictures


def pictures(path: str | Path) -> dict[str, Path]:
    """The picture files of a folder and its subfolders by their names in it (see `stems`), or the one file.

    Raises ValueError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    files = image.files(path)
    if not files:
        raise ValueError(f"{path}: no pictures in this folder")
    names = stems([p.relative_to(path) for p in files])
    return {str(name): file for name, file in zip(names, files, strict=True)}


def stems(paths: Sequence[Path]) -> list[Path]:
    """Each path without its suffix; with it where two would become one, as of a.jpg and a.png."""
    names = [path.with_suffix("") for path in paths]
    while True:
        count = Counter(names)
        same = [i for i, name in enumerate(names) if count[name] > 1 and name != paths[i]]
        if not same:
            return names
        for i in same:  # a.png may now have the name of a.png.png
            names[i] = paths[i]


def _partners(truths: dict[str, Path], path: str | Path | None, means: bool = False) -> dict[str, Path]:
    """The pictures of `path` by their names, or, of means, by NAME-mean; of one truth the partner is the one file."""
    if path is None:
        return {}
    if Path(path).is_file() and len(truths) == 1:
        return dict.fromkeys(truths, Path(path))
    partners = pictures(path)
    if means:  # of several samples
        partners |= {
            name: partners[f"{name}-mean"]
            for name in truths.keys() - partners.keys()
            if f"{name}-mean" in partners and f"{name}-mean" not in truths
        }
    if not truths.keys() & partners.keys():
        raise ValueError(f"{path}: no picture here has the name of a truth, such as {next(iter(truths))}")
    return partners


def _partner(name: str, truth: Path, partners: dict[str, Path], place: str | Path) -> Path:
    if name not in partners:
        raise ImageError(f"no picture named {name} in {place}", truth)
    return partners[name]


def _scale_of(pairs: Iterable[tuple[Path, Path]]) -> float:
    """How much larger than its source the first truth is that can be read: whole, where it need only be cut."""
    for pair in pairs:
        with contextlib.suppress(ImageError, OSError):
            high, low = (image.header(path)[0] for path in pair)
            scale = min(a / b for a, b in zip(high, low, strict=True))
            whole = int(scale)
            scale = whole if all(a - whole * b < whole for a, b in zip(high, low, strict=True)) else scale
            if scale >= 1:
                return scale
    raise ValueError("no truth and its source can be read, the source the smaller: give scale")


def _color(path: Path) -> Photo:
    return Photo(Photo.read(path).color)


def _pair(path: Path, high: Photo, source: Path | None, scale: float) -> tuple[Photo, Photo]:
    """The truth, cut to a whole multiple of its source, and the source: read, or made by bicubic."""
    if source is None:
        size, small = image.divisible(high.size, scale)
        if min(small) < 1:
            raise ImageError(f"{_by(high.size)} is too small to be a truth", path)
        high = _cut(high, size)
        low = high.resized(small)
        return high, Photo.of(low.with_color(low.tensor()))  # as a file would hold it: bicubic overshoots
    low = _color(source)
    size = (round(low.size[0] * scale), round(low.size[1] * scale))
    if any(not 0 <= have - need < scale for have, need in zip(high.size, size, strict=True)):
        raise ImageError(
            f"{_by(low.size)}, {scale:g} times larger, is not the size of {path}, {_by(high.size)}", source
        )
    if size != high.size:
        warnings.warn(
            f"a truth that is no {scale:g} times its source is cut at the right and below: a source that was made of "
            "all of it does not lie on what is left",
            stacklevel=3,
        )
    return _cut(high, size), low


def _finished(path: Path, whole: tuple[int, int], size: tuple[int, int]) -> Photo:
    """A result of the truth's size, which is `whole` in its file and `size` where it is cut."""
    made = _color(path)
    if made.size not in (whole, size):
        cut = "" if whole == size else f", cut to {_by(size)}"
        raise ImageError(f"a result must have the truth's size, {_by(whole)}{cut}: got {_by(made.size)}", path)
    return _cut(made, size)


def _cut(photo: Photo, size: tuple[int, int]) -> Photo:
    return Photo(photo.color.crop((0, 0, *size)))


def _upscaled(upscaler: Upscaler, low: Photo, seed: int) -> Photo:
    drawn = upscaler(low, seed)
    assert isinstance(drawn, Image.Image)  # not a Spread: samples= was not given
    return Photo.of(drawn)


# ----------------------------------------------------------------------------------------- the numbers


def _scores(picture: Photo, truth: Photo, source: Photo) -> Scores:
    y, y_0, small = (photo.tensor(3)[None] for photo in (picture, truth, source))
    side = min(truth.size)
    return Scores(
        metrics.psnr(y, y_0).item(),
        metrics.ssim(y, y_0).item() if side >= metrics.SSIM_SIDE else None,
        metrics.consistency(y, small).item() * 1e5,
        metrics.spectral_distance(y, y_0).item() if side >= SPECTRUM_SIDE else None,
    )


def _bound(upscaler: Upscaler | None, steps: int, seed: int) -> Callable[[Photo, Photo], float]:
    """f(truth, source): the variational bound on -log2 p(truth given source), in bits a dimension."""
    if upscaler is None:
        raise ValueError("bits needs an upscaler: the bound is of its network")
    model, channels, device = upscaler.model, upscaler.channels, upscaler.device
    if model.target.kind != "image":
        raise ValueError("bits needs weights whose target is the image: a residual is on no 256 levels")
    T = model.schedule.T
    if not min(2, T) <= steps <= T:
        raise ValueError(f"bits must lie in {min(2, T)}..T = {T}: got {steps}")
    f_theta, multiple = Tiled(model.unet, upscaler.tiled.tile), model.unet.multiple

    def bits(high: Photo, low: Photo) -> float:
        if high.color.mode == "F":
            raise ImageError("the bound is of pictures with 256 levels: this one has 16 bits")
        size = tuple(side // multiple * multiple for side in high.size)
        if 0 in size:
            raise ImageError(f"the bound is of pictures of at least {_by((multiple, multiple))}: got {_by(high.size)}")
        # what is padded would count: the bound is of the part that the network takes as it is
        x, y_0 = (_cut(p, size).tensor(channels)[None].to(device) for p in (low.resized(high.size), high))
        return variational_bound(f_theta, x, y_0, model.schedule, seed, level=model.level, steps=steps)["bits"]

    return bits


def _mean(values: Iterable[float | None]) -> Any:
    """Of those that there are; None of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"


def _plain(scores: dict[str, Scores]) -> dict[str, dict[str, float | None]]:
    return {
        who: {
            name: value if value is not None and math.isfinite(value) else None for name, value in s._asdict().items()
        }
        for who, s in scores.items()
    }


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
