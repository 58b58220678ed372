"""A picture in, a larger picture out: any size, any of Pillow's modes, in bounded memory.

picture -> Photo -> x, padded -> Sampler over Tiled(f_theta) -> y_0, cut -> Photo -> picture
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import image, noise, ops, weights
from .device import fast_dtype, find_device
from .sampler import Run, Sampler, draw_seed, network
from .weights import Model, Target

__all__ = ["Picture", "Spread", "Tiled", "Trace", "Upscaler", "upscale"]

Picture = Image.Image | image.Photo | np.ndarray | str | os.PathLike | IO[bytes]
"""What is taken for a picture; see `upscale`."""
TILE = 512
"""Side of a window, at most, where `tile` is not given."""
UNTILED = 2**20
"""Pixels up to which a picture goes through the network whole, where `tile` is not given."""


class Spread(NamedTuple):
    """Several samples of one source; where their std is large, the picture is a guess."""

    pictures: list[Image.Image]
    mean: Image.Image
    std: Tensor
    """[C, H, W], in units of [-1, 1], unbiased."""


def upscale(
    picture: Picture,
    model: Model | str | Path = "photo-x4",
    *,
    scale: float | None = None,
    steps: int | None = None,
    seed: int | None = 0,
    tile: int | None = None,
    solver: str | None = None,
    grid: str | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    consistency: bool | None = None,
    samples: int | None = None,
    trace: Trace | None = None,
    progress: bool = False,
) -> Image.Image | Spread:
    """The picture `scale` times larger, in its mode (palettes become RGB), with its alpha, ICC profile, EXIF and dpi.

    Args:
        picture: Pillow's image, a file's path, or a file opened in binary (turned as its EXIF orientation says); a
            uint8 array [H, W], [H, W, 3] or [H, W, 4]; an image.Photo.
        model: the name of weights that ship, a folder of weights.save, or a weights.Model. For a checkpoint
            of Janspiry's code: compat.janspiry.model("I1_E1_gen.pth", scale=4).
        scale: the weights' own by default; one that they do not support is refused.
        steps, solver, grid: see Sampler; by default what the weights' card says, else 25 steps. The card's solver and
            grid belong together: where one of them is given, the card has no say in the other.
        seed: the same seed gives the same noise on every device, tiled or not. None draws one, which the log
            tells (level INFO).
        tile: the largest side of a window, 0 for the whole picture at once; by default windows of at most 512
            where the result has more than 2^20 pixels.
        dtype: of the network's arithmetic; by default bfloat16 where the device is fastest in it, else float32
            (results of the two differ by about a level of 255). y_t is float32.
        device: by default where a Model's parameters are, else the GPU if there is one. A Model is moved there.
        consistency: add up(source - down(y_0)), so that the result shrinks to the source.
        samples: draw this many, with seeds seed, seed + 1, ...; a Spread is returned.
        trace: receives pictures of y_t on the way.
        progress: show a bar over the steps.

    Raises:
        FileNotFoundError: no such picture or weights.
        ImageError: a picture that cannot be used; and after the steps, a result that is not finite.
        ValueError, TypeError: an option out of its range, a device that is not there, an object that is no
            picture, model or seed. Each message is one line.

    Use an `Upscaler` for many pictures: it reads the weights once.
    """
    options = {"scale": scale, "steps": steps, "tile": tile, "solver": solver, "grid": grid, "dtype": dtype}
    upscaler = Upscaler(model, device=device, consistency=consistency, **options)  # type: ignore[arg-type]
    return upscaler(picture, seed, samples=samples, trace=trace, progress=progress)


class Upscaler:
    """`upscale` with its weights and options bound: upscaler(picture, seed) -> picture.

    Attributes:
        scale: enlargement.
        channels: of the network, 1 or 3.
        model, sampler: what it runs.
        last_seed: the (first) seed of the last call, the drawn one where it was None.
    """

    def __init__(
        self,
        model: Model | str | Path = "photo-x4",
        *,
        scale: float | None = None,
        steps: int | None = None,
        tile: int | None = None,
        solver: str | None = None,
        grid: str | Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        consistency: bool | None = None,
    ):
        if not isinstance(model, Model):
            device = find_device(device)
            model = _load(model)
        if device is not None:
            model.unet.to(find_device(device))
        unet, card = model.unet, model.card
        self.model = model
        self.scale = _scale(model, scale)
        self.channels = unet.out_channels
        if self.channels not in (1, 3) or unet.in_channels != 2 * self.channels:
            raise ValueError(
                "pictures need a network that makes 1 or 3 channels from as many (Sampler takes any): got "
                f"{unet.in_channels - unet.out_channels} -> {unet.out_channels}"
            )
        self.consistency = card.get("consistency", False) if consistency is None else consistency
        if steps is None and (grid is None or isinstance(grid, str)):  # a list of levels has its own length
            steps = card.get("steps", 25)
        if solver is None and grid is None:
            solver, grid = card.get("solver"), card.get("grid")
        self.last_seed: int | None = None
        if dtype is None and (own := next(unet.parameters())).dtype == torch.float32:
            dtype = fast_dtype(own.device)
        self.tiled = Tiled(unet, tile, dtype=dtype)
        self.sampler = Sampler(
            self.tiled,
            model.schedule,
            solver=solver,
            steps=steps,
            grid=grid,
            level=model.level,
            target=model.target,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.unet.parameters()).device

    def __call__(
        self,
        picture: Picture,
        seed: int | None = 0,
        *,
        samples: int | None = None,
        trace: Trace | None = None,
        progress: bool = False,
        each: Callable[[int, Image.Image], None] | None = None,
    ) -> Image.Image | Spread:
        """See `upscale`; each(i, picture) is called as soon as sample i is there, 0 .. samples - 1."""
        if samples is not None and samples < 2:
            raise ValueError(f"samples must be at least 2, to have a deviation: got {samples}")
        if seed is None:
            seed = draw_seed()
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seed must be a whole number, or None to draw one (samples= draws several): got {seed!r}")
        self.last_seed = seed
        with image.naming(picture):
            source = _photo(picture)
            width, height = self.check(source.size)
            small = source.tensor(self.channels)[None].to(self.device)
        large = source.resized((width, height))
        x = large.tensor(self.channels)[None].to(self.device)
        padded = image.reflect_pad(x, self.model.unet.multiple)

        y_0s: list[Tensor] = []
        pictures: list[Image.Image] = []
        for i in range(samples or 1):
            callback = None
            if trace is not None and i == 0:
                y_T = ops.noise(padded.shape, seed, domain=noise.Y_T, device=padded.device)  # as the sampler draws it
                callback = trace.start(large, padded, y_T, self.model.target, len(self.sampler.table))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "x looks like")  # a bright picture has no negative values
                warnings.filterwarnings("ignore", "y_0 is not finite")  # refused below
                y_0 = self.sampler(padded, seed + i, callback=callback, progress=progress)
            assert isinstance(y_0, Tensor)  # not Samples: samples= was not given
            if not y_0.isfinite().all():
                raise image.ImageError("the result is not finite: damaged weights, or a dtype of too small a range")
            y_0 = y_0[..., :height, :width]
            if self.consistency:
                y_0 = y_0 + image.resize(small - image.resize(y_0, (small.shape[2], small.shape[3])), (height, width))
            y_0s.append(y_0[0].cpu())
            pictures.append(large.with_color(y_0s[-1]))
            if trace is not None and i == 0:
                trace.finish(y_0s[0])
            if each is not None:
                each(i, pictures[-1])
        if samples is None:
            return pictures[0]
        std, mean = torch.std_mean(torch.stack(y_0s), 0)
        return Spread(pictures, large.with_color(mean), std)

    def check(self, size: tuple[int, int]) -> tuple[int, int]:
        """The result's (width, height) for a source's; ImageError where it is too small or too large."""
        if min(size) < 1:
            raise image.ImageError(f"a picture needs at least a pixel: got {size[0]} x {size[1]}")
        large = (round(size[0] * self.scale), round(size[1] * self.scale))
        image.check_size(large, f"the result, {self.scale:g} times {size[0]} x {size[1]}: ")
        return large


def _photo(picture: Picture) -> image.Photo:
    if isinstance(picture, image.Photo):
        return picture
    if isinstance(picture, Image.Image):
        return image.Photo.of(picture)
    if isinstance(picture, str | os.PathLike) or hasattr(picture, "read"):
        return image.Photo.read(picture)  # type: ignore[arg-type]
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.uint8 and (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
            return image.Photo.of(Image.fromarray(picture))
        got = f"{picture.dtype} {list(picture.shape)}"
    else:
        got = type(picture).__name__
    raise TypeError(
        "a picture is Pillow's image, a path, a file opened in binary, or a uint8 array [H, W], [H, W, 3] or "
        f"[H, W, 4] (Sampler takes tensors): got {got}"
    )


def _load(model: str | os.PathLike) -> Model:
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            "model must be the name of weights that ship, a folder's path, or a weights.Model (of a UNet: "
            f"Model(unet, schedule, scale=4)): got {type(model).__name__}"
        )
    if Path(model).is_file():
        raise ValueError(
            f"weights are a folder, {model} is a file: give a checkpoint of Janspiry's code as "
            f"compat.janspiry.model({str(model)!r}, scale=4)"
        )
    return weights.load(os.fspath(model))


def _scale(model: Model, scale: float | None) -> float:
    if model.scale is None:
        if scale is None:
            raise ValueError("these weights do not say how much they enlarge: give the scale they trained for")
        if not 1 <= scale < math.inf:
            raise ValueError(f"scale must be at least 1: got {scale}")
        return scale
    if scale is None:
        return model.scale
    supported = model.card.get("scales", [model.scale])
    if scale not in supported:
        allowed = " or ".join(f"{s:g}" for s in supported)
        raise ValueError(f"these weights enlarge {allowed} times: got scale {scale:g}")
    return scale


# ---------------------------------------------------------------------------------------- windows


class Tiled(nn.Module):
    """f_theta on overlapping windows of y_t: eps_hat for a picture of any size, in memory for a few windows.

        eps_hat = sum_k w_k f_theta(x_k, y_k, level),   sum_k w_k = 1 at every pixel

    k runs over the windows; w_k falls from 1 to 0 over the overlap as a squared sine, and stays 0 for the
    outer eighth, where the network saw its own padding. Because the predictions are blended at every step,
    over one y_t and one noise field, neighbouring windows agree on what they share, and no seam remains.

    Args:
        f_theta: a UNet, or any network that takes (x, y_t, level).
        tile: the largest side of a window, 0 for none; by default 512 for more than 2^20 pixels.
        batch: windows that go through the network together; by default 1 on a CPU and 8 elsewhere.
        dtype: of the network's input and arithmetic; by default that of the parameters.

    It has the interface of the engine (`start_run`), so a Sampler runs it as it runs a network.
    """

    def __init__(
        self,
        f_theta: nn.Module,
        tile: int | None = None,
        *,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.f_theta = f_theta
        self.multiple = getattr(f_theta, "multiple", 1)
        least = 8 * max(self.multiple, 2)
        if tile and tile < least:
            raise ValueError(f"tile must be 0 (none) or at least {least} for this network: got {tile}")
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be at least 1: got {batch}")
        self.tile, self.batch = tile, batch
        self.network = network(f_theta, dtype)
        if hasattr(f_theta, "variant"):
            self.variant = f_theta.variant
        if hasattr(f_theta, "out_channels"):
            self.out_channels = f_theta.out_channels

    def forward(self, x: Tensor | None, y_t: Tensor, level: Tensor) -> Tensor:
        """eps_hat of y_t's shape, for inference: it has no gradient.

        x: [B, Cx, H, W] or None; y_t: [B, Cy, H, W]; level: [B, 1] or [B], the same for the whole batch.
        """
        if not (level == level.flatten()[0]).all():
            raise ValueError(f"the windows of a batch share one level: got {level.flatten().tolist()}")
        run = self.start_run(x, y_t.shape, level.flatten()[:1])
        run.into.copy_(y_t)
        return run(0)

    def start_run(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> Run:
        """A run over `levels` [N] for y of `shape` [B, C, H, W], its sides multiples of the network's."""
        H, W = shape[2:]
        tile = self.tile
        if tile is None:
            tile = TILE if H * W > UNTILED else 0
        if not tile or tile >= max(H, W):
            return self.network.start_run(x, shape, levels)
        return _TiledRun(self, tile, x, shape, levels)


class _TiledRun:
    def __init__(self, tiled: Tiled, tile: int, x: Tensor | None, shape: Sequence[int], levels: Tensor):
        B, C, H, W = shape
        device = levels.device
        tops, row_weights = windows(H, tile, tiled.multiple)
        lefts, column_weights = windows(W, tile, tiled.multiple)
        h, w = row_weights.shape[1], column_weights.shape[1]
        self.windows = [
            (
                (slice(b, b + 1), slice(None), slice(top, top + h), slice(left, left + w)),
                (row[:, None] * column).to(device),
            )
            for b in range(B)
            for top, row in zip(tops, row_weights, strict=True)
            for left, column in zip(lefts, column_weights, strict=True)
        ]
        most = tiled.batch or (1 if device.type == "cpu" else 8)
        calls = math.ceil(len(self.windows) / most)
        self.batch = math.ceil(len(self.windows) / calls)
        self.x = x
        self.into = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        self.eps_hat = torch.empty_like(self.into)
        first = None if x is None else x.new_empty(self.batch, x.shape[1], h, w)
        self.run = tiled.network.start_run(first, (self.batch, C, h, w), levels)

    def __call__(self, i: int) -> Tensor:
        self.eps_hat.zero_()
        for start in range(0, len(self.windows), self.batch):
            group = self.windows[start : start + self.batch]
            for k, (place, _) in enumerate(group):
                if self.x is not None and self.run.x is not None:
                    self.run.x[k : k + 1].copy_(self.x[place])
                self.run.into[k : k + 1].copy_(self.into[place])
            for eps_hat, (place, weight) in zip(self.run(i), group):  # noqa: B905  the last group may be smaller
                self.eps_hat[place] += weight * eps_hat
        return self.eps_hat


def windows(length: int, tile: int, multiple: int = 1) -> tuple[list[int], Tensor]:
    """Where the windows begin along one side, and their weights float32 [n, window], of sum 1 at every pixel.

    As few windows as overlap by an eighth of `tile`, then as short as they can be; length, window and starts
    are multiples of `multiple`, so that a network that halves its input sees each pixel in the same phase.
    """
    if length <= tile:
        return [0], torch.ones(1, length)
    tile = tile // multiple * multiple
    overlap = math.ceil(max(tile / 8, 4) / multiple) * multiple
    n = math.ceil((length - overlap) / (tile - overlap))
    window = math.ceil((length + (n - 1) * overlap) / n / multiple) * multiple
    starts = [round(i * (length - window) / (n - 1) / multiple) * multiple for i in range(n)]
    weights = torch.ones(n, window, dtype=torch.float64)
    for i in range(n - 1):
        shared = starts[i] + window - starts[i + 1]
        margin = math.ceil(shared / 8)
        ramp = (torch.arange(shared, dtype=torch.float64) + 0.5 - margin) / (shared - 2 * margin)
        ramp = torch.sin(math.pi / 2 * ramp.clamp(0, 1)).square()
        weights[i, window - shared :] *= 1 - ramp
        weights[i + 1, :shared] *= ramp
    return starts, weights.float()


# ------------------------------------------------------------------------------------------- trace


class Trace:
    """Pictures of y_t on the way from noise to picture, evenly spaced over the steps.

    trace = Trace(); upscale(picture, trace=trace); trace.save("strip.png")

    For a residual target, what is shown is x plus the noisy residual.

    Args:
        frames: how many, from pure noise to the result.
        side: longer frames are shrunk to this.
    """

    def __init__(self, frames: int = 8, side: int = 384):
        if frames < 2:
            raise ValueError(f"a trace needs at least 2 frames: got {frames}")
        self.frames = frames
        self.side = side
        self.pictures: list[Image.Image] = []

    def start(self, large: image.Photo, x: Tensor, y_T: Tensor, target: Target, steps: int) -> Callable[..., None]:
        """The Sampler's callback for a run of so many steps from y_T towards `large`, whose padded source is x."""
        self.pictures = []
        wanted = {round(i * steps / (self.frames - 1)) for i in range(self.frames)}

        def callback(step: int, y: Tensor, y_0_hat: Tensor | None = None) -> None:
            if step in wanted:
                self.pictures.append(self._frame(target.decode(y, x)[0], large.size))

        callback(steps, y_T)
        return callback

    def finish(self, y_0: Tensor) -> None:
        """The last frame is the result as it is returned, y_0 [C, H, W]: made consistent where that was asked for."""
        self.pictures[-1] = self._frame(y_0, (y_0.shape[2], y_0.shape[1]))

    def _frame(self, values: Tensor, size: tuple[int, int]) -> Image.Image:
        frame = image.to_picture(values[:, : size[1], : size[0]])
        shrink = max(size) / self.side
        return frame if shrink <= 1 else image.bicubic(frame, _at_least_1(size[0] / shrink, size[1] / shrink))

    def strip(self, gap: int = 4) -> Image.Image:
        """The frames side by side on white."""
        return beside(self.pictures, gap)

    def save(self, path: str | Path, duration: int = 160) -> None:
        """An animation where the suffix is .gif or .webp, `duration` milliseconds a frame, else a strip."""
        if Path(path).suffix.lower() not in (".gif", ".webp"):
            return image.write(self.strip(), path)
        first, *others = self.pictures
        durations = [duration] * len(others) + [10 * duration]
        image.write(first, path, save_all=True, append_images=others, duration=durations, loop=0)


def beside(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures of one height in a row, on white."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def _at_least_1(width: float, height: float) -> tuple[int, int]:
    return max(round(width), 1), max(round(height), 1)
