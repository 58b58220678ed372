"""Training data: crops of target pictures and their sources x, in an order that depends on the seed alone.

`open_items` understands a folder of pictures, a folder of pairs, .npy arrays, and the folders and LMDB of
Janspiry's SR3 code; `Pictures` cuts crops from them; `Order` says which crop comes when. Nothing here keeps
a state: the crop at position p of the stream is known from (seed, p), so that a resumed run goes on where it
stopped.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from . import image, noise

_JANSPIRY = re.compile(r"sr_(\d+)_(\d+)")  # a folder of theirs: x, enlarged from one side to the other

SUFFIXES = (*image.SUFFIXES, ".npy")
AUGMENTATIONS = ("none", "flip", "dihedral")

Size = tuple[int, int]  # height, width
Read = Callable[[], np.ndarray]  # -> [C, H, W], uint8, uint16 or float32 in [-1, 1]


class DataError(ValueError):
    """Data that cannot be trained on. The message is one line, names the file or folder, and states the
    rule.
    """


class Skipped(UserWarning):
    """A picture that is left out. The message names it and says why."""


@dataclass(frozen=True)
class Item:
    """One picture: its target, and its source where the data brings one (else the source is made from the
    target). `channels` are those of the two; none where no header tells.
    """

    name: str
    size: Size
    channels: tuple[int, ...]
    target: Read
    source: Read | None = None


# What is in a folder


def open_items(path: str | Path, scale: float = 4) -> list[Item]:
    """The pictures under `path`, in the order of their names.

    folder of pictures         targets; sources are made from them (also in its subfolders)
    folder with hr/ and lr/    pairs of equal names; lr is `scale` times smaller, or already of hr's size
    folder with hr_R/, sr_L_R/ Janspiry's folders: sr is x
    folder with data.mdb       Janspiry's LMDB (needs the package lmdb)
    file .npy                  targets [N, C, H, W]
    A picture is an image file or a .npy of [C, H, W]: uint8, uint16, or float in [-1, 1]. Sizes are those after
    the EXIF orientation; a file whose header is broken is left out with a warning, `Skipped`.

    Raises:
        DataError: nothing there, names without a partner, sizes that do not fit `scale`.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if _is_array(path):
        return _array_items(path)
    if not path.is_dir():
        raise DataError(f"{path}: the data must be a folder, or an array in a .npy file")
    if (path / "data.mdb").exists():
        return _lmdb_items(path, scale)
    theirs = [folder for folder in sorted(path.iterdir()) if _JANSPIRY.fullmatch(folder.name) and folder.is_dir()]
    if len(theirs) > 1:
        raise DataError(
            f"{path} holds several of Janspiry's folders, keep one: got {', '.join(f.name for f in theirs)}"
        )
    if theirs:
        _check_factor(theirs[0], theirs[0].name, scale)
        return _pair_items(path / f"hr_{theirs[0].name.split('_')[2]}", theirs[0], scale)
    if (path / "hr").is_dir():
        return _pair_items(path / "hr", path / "lr", scale)
    return [
        Item(str(file), head[0], (head[1],), partial(read, file))
        for file in _files(path)
        if (head := _header(file)) is not None
    ]


def read(path: str | Path) -> np.ndarray:
    """A picture's values [C, H, W]: uint8, uint16 or float32 in [-1, 1]. Alpha is left out."""
    if _is_array(path):
        return _in_range(_array(path, 3), path)
    return _values(image.Photo.read(path).color)


def _is_array(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".npy"


def _values(picture: Image.Image) -> np.ndarray:
    values = np.asarray(picture)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return values.astype(np.uint16) if values.dtype == np.float32 else np.ascontiguousarray(values)


def _array(path: str | Path, ndim: int) -> np.ndarray:
    """A file's array, mapped and not read: of so many of the dimensions [N, C, H, W], and of a dtype that is known."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: a broken array ({error}): save it again") from error
    if values.ndim != ndim:
        expected = "[N, C, H, W]" if ndim == 4 else "[C, H, W]"
        raise DataError(f"{path}: an array must be {expected}: got shape {values.shape}")
    if values.dtype.kind != "f" and values.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path}: values must be uint8, uint16 or float in [-1, 1]: got {values.dtype}")
    return values


def _in_range(values: np.ndarray, path: str | Path) -> np.ndarray:
    """A mapped picture's values in memory, floats as float32."""
    if values.dtype.kind != "f":
        return np.array(values)
    values = np.array(values, dtype=np.float32)
    if not (abs(values) <= 1).all():
        raise DataError(f"{path}: float values must lie in [-1, 1]: got {values.min()} .. {values.max()}")
    if values.size and values.min() >= 0:
        warnings.warn("floats of an array look like [0, 1]; SR3 works on [-1, 1]: 2 * x - 1", stacklevel=2)
    return values


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = image.files(folder, SUFFIXES)
    if not files:
        raise DataError(f"{folder}: no pictures there (looked for {', '.join(SUFFIXES)}, in subfolders too)")
    return files


def _header(file: Path) -> tuple[Size, int] | None:
    """Size and channels of what `read` gives, without decoding; None, and a warning, where the file is broken."""
    try:
        if _is_array(file):
            channels, height, width = _array(file, 3).shape
        else:
            (width, height), channels = image.header(file)
        return (height, width), channels
    except (OSError, image.ImageError, DataError) as error:
        _skip(file, error)
        return None


def _skip(name: object, problem: object) -> None:
    text = str(problem)
    warnings.warn(f"skipped {text if text.startswith(str(name)) else f'{name}: {text}'}", Skipped, stacklevel=3)


def _pair_items(targets: Path, sources: Path, scale: float) -> list[Item]:
    names: list[dict[Path, Path]] = [{}, {}]
    for found, folder in zip(names, (targets, sources), strict=True):
        for file in _files(folder):
            name = file.relative_to(folder).with_suffix("")
            if name in found:
                both = " and ".join(sorted((found[name].name, file.name)))
                raise DataError(f"names without their suffix tell pairs: {folder} has {both}")
            found[name] = file
    alone = sorted(set(names[0]) ^ set(names[1]))
    if alone:
        folder, other = (targets, sources) if alone[0] in names[0] else (sources, targets)
        raise DataError(
            f"every picture needs a partner: {alone[0]} is in {folder}, not in {other} ({len(alone)} such names)"
        )
    items = []
    for name, file in names[0].items():
        target, source = _header(file), _header(names[1][name])
        if target is None or source is None:
            continue
        _check_pair(name, target[0], source[0], scale)
        if source[0] != target[0] and image.divisible(target[0], scale)[0] != tuple(target[0]):
            warnings.warn(
                f"a target that is no {scale:g} times its source is cut at the right and below: a source that was made "
                "of all of it does not lie on what is left",
                stacklevel=2,
            )
        channels = (target[1], source[1])
        items.append(Item(str(name), target[0], channels, partial(read, file), partial(read, names[1][name])))
    return items


def _check_factor(path: Path, name: str, scale: float) -> None:
    """Of Janspiry's name, sr_L_R..."""
    low, high = map(int, name.split("_")[1:3])
    if high != low * scale:
        raise DataError(f"{path}: {name} is {high / low:g} times, not {scale:g}: give scale={high / low:g} (--scale)")


def _check_pair(name: object, target: Sequence[int], source: Sequence[int], scale: float) -> None:
    if source != target and any(abs(a - b * scale) >= scale for a, b in zip(target, source, strict=True)):
        raise DataError(
            f"{name}: a source must have the target's size or be {scale:g} times smaller: "
            f"got target {target[0]} x {target[1]}, source {source[0]} x {source[1]}"
        )


def _array_items(path: Path) -> list[Item]:
    n, c, h, w = _array(path, 4).shape
    return [Item(f"{path}[{i}]", (h, w), (c,), partial(_slice, path, i)) for i in range(n)]


def _slice(path: Path, i: int) -> np.ndarray:
    return _in_range(_array(path, 4)[i], f"{path}[{i}]")


def _lmdb_items(path: Path, scale: float) -> list[Item]:
    with _lmdb(path).begin() as transaction:
        count = int(transaction.get(b"length") or 0)
        keys = [bytes(key).decode() for key in transaction.cursor().iternext(keys=True, values=False)]
    matches = [match for key in keys if (match := re.fullmatch(r"sr_(\d+)_(\d+)_\d{5}", key))]
    if not count or not matches:
        raise DataError(f"{path}: an LMDB must hold length, hr_R_i and sr_L_R_i: got {len(keys)} other keys")
    _check_factor(path, matches[0].group(), scale)
    low, high = matches[0].group(1), int(matches[0].group(2))
    return [
        Item(
            f"{path}[{i}]",
            (high, high),
            (),
            partial(_record, path, f"hr_{high}_{i:05d}"),
            partial(_record, path, f"sr_{low}_{high}_{i:05d}"),
        )
        for i in range(count)
    ]


@lru_cache
def _lmdb(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise DataError(f"{path} is an LMDB: pip install 'sr3fast[lmdb]'") from error
    return lmdb.open(str(path), readonly=True, lock=False, readahead=False)


def _record(path: Path, key: str) -> np.ndarray:
    with _lmdb(path).begin() as transaction:
        value = transaction.get(key.encode())
    if value is None:
        raise DataError(f"{path}: no record {key}")
    return _values(image.Photo.read(BytesIO(value)).color)


# Crops


class Pictures(Dataset):
    """Crops by key (epoch, index): tensors (x, image), each float32 [C, crop, crop] in [-1, 1].

    x is what the network will see: Pillow's bicubic down by `scale` in 8 bits (float for 16-bit and float
    pictures) and up again, cut from the whole picture's, so that a crop has no borders of its own. The
    crop's place and flip are noise v1's domain 4 at (seed * 2^32 + index, epoch).

    items     from `open_items`
    crop      side of a crop in pixels
    scale     > 1; need not be a whole number
    channels  of the network; gray pictures are repeated to 3
    augment   "none", "flip" (left and right) or "dihedral" (the square's 8 symmetries)
    memory    bytes of decoded pictures that are kept

    A picture smaller than the crop, or of channels that the network does not take, is left out; a file that turns
    out to be broken or not to fit is too, and the next one stands in for it. A warning, `Skipped`, names each.
    Raises DataError where none is left.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        crop: int = 128,
        scale: float = 4,
        channels: int = 3,
        augment: str = "flip",
        seed: int = 0,
        memory: int = 2**29,
    ) -> None:
        if not scale > 1:
            raise ValueError(f"scale must be more than 1: got {scale}")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}: got {augment!r}")
        if not items:
            raise DataError("no picture can be read")
        self.crop, self.scale, self.channels = crop, scale, channels
        self.augment, self.seed, self.memory = augment, seed, memory
        unfit = {i: problem for i, item in enumerate(items) if (problem := self._misfit(item.size, item.channels))}
        if len(unfit) == len(items):
            raise DataError(f"{items[0].name}: {unfit[0]} (none of {len(items)} fits)")
        for i, problem in unfit.items():
            _skip(items[i].name, problem)
        self.items = [item for i, item in enumerate(items) if i not in unfit]
        self._kept: OrderedDict[int, tuple[np.ndarray, np.ndarray | None]] = OrderedDict()
        self._broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        seeds = torch.tensor([noise.signed64((self.seed << 32) + index) for _, index in keys])
        epochs = torch.tensor([epoch for epoch, _ in keys])
        zero = torch.zeros((), dtype=torch.int64)
        a0, a1, a2, _ = noise.words(seeds, noise.AUGMENT, epochs, zero, zero, zero)
        draws = zip(noise.uniform(a0).tolist(), noise.uniform(a1).tolist(), (a2 & 7).tolist(), strict=True)
        return [self._sample(index, *draw) for (_, index), draw in zip(keys, draws, strict=True)]

    def _sample(self, index: int, u: float, v: float, symmetry: int) -> tuple[Tensor, Tensor]:
        target, source = self.load(index)
        size, _ = image.divisible(target.shape[-2:], self.scale)
        step = round(self.scale) if self.scale == round(self.scale) else 1
        top, left = (
            int(place * ((side - self.crop) // step + 1)) * step for place, side in zip((u, v), size, strict=True)
        )
        window = (top, left, top + self.crop, left + self.crop)
        x, y = tensor(conditioned(target, source, self.scale, window)), tensor(cut(target, window))
        if self.augment == "none":
            return x, y
        return (
            symmetric(x, symmetry if self.augment == "dihedral" else symmetry & 1),
            symmetric(y, symmetry if self.augment == "dihedral" else symmetry & 1),
        )

    def uncropped(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(source, x, image) of a whole picture, cut to sides that are whole at 1/scale; for validation.

        A source that the data brings at the target's size is made small again, as consistency needs it.
        """
        target, source = self.load(index)
        size, _ = image.divisible(target.shape[-2:], self.scale)
        window = (0, 0, *size)
        x = conditioned(target, source, self.scale, window)
        if source is None or source.shape == target.shape:
            source = shrink(target if source is None else source, self.scale, size)
        return tensor(source), tensor(x), tensor(cut(target, window))

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The values of a picture and of its own source, if it has one: kept, least recently used out
        first.
        """
        for _ in range(len(self.items)):
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
            if index not in self._broken:
                try:
                    return self._keep(index)
                except (OSError, image.ImageError, DataError) as error:
                    self._broken[index] = str(error)
                    _skip(self.items[index].name, error)
            index = (index + 1) % len(self.items)
        raise DataError(f"none of the {len(self.items)} pictures can be read, the last: {self._broken[index]}")

    def _keep(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        item = self.items[index]
        target, source = item.target(), item.source and item.source()
        channels = (len(target),) if source is None else (len(target), len(source))
        if problem := self._misfit(target.shape[1:], channels):  # a header can be wrong, or tell nothing
            raise DataError(f"{item.name}: {problem}")
        if source is not None:
            _check_pair(item.name, target.shape[1:], source.shape[1:], self.scale)
            source = self._repeated(source)
        target = self._repeated(target)
        self._kept[index] = target, source
        while len(self._kept) > 1 and sum(a.nbytes for pair in self._kept.values() for a in pair if a is not None) > (
            self.memory
        ):
            self._kept.popitem(last=False)
        return target, source

    def _misfit(self, size: Sequence[int], channels: Sequence[int]) -> str | None:
        """Why a picture of this size, and of these channels as target and source, cannot be taken."""
        for count in channels:
            if count != self.channels and (count, self.channels) != (1, 3):
                return f"the network has {self.channels} channels, the picture has {count}"
        if min(image.divisible(size, self.scale)[0]) < self.crop:
            return (
                f"a picture must hold a crop of {self.crop} pixels, whole at 1/{self.scale:g}: "
                f"got {size[0]} x {size[1]}"
            )
        return None

    def _repeated(self, values: np.ndarray) -> np.ndarray:
        return values if len(values) == self.channels else np.repeat(values, self.channels, 0)


def cut(values: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """values[C, top:bottom, left:right]"""
    top, left, bottom, right = window
    return values[:, top:bottom, left:right]


def shrink(target: np.ndarray, scale: float, size: Size) -> np.ndarray:
    """The first `size` pixels of a target made `scale` times smaller."""
    small = (round(size[0] / scale), round(size[1] / scale))
    return bicubic(cut(target, (0, 0, *size)), small, (0, 0, *size))


def conditioned(
    target: np.ndarray, source: np.ndarray | None, scale: float, window: tuple[int, int, int, int]
) -> np.ndarray:
    """x in a window (top, left, bottom, right) of the target: that of the whole picture's x.

    It is equal to it where scale is a whole number, else within two levels of 255: Pillow rounds its filters.
    """
    if source is not None and source.shape == target.shape:
        return cut(source, window)
    top, left, bottom, right = window
    size, small = image.divisible(target.shape[-2:], scale)
    small = small if source is None else source.shape[-2:]
    sy, sx = (a / b for a, b in zip(size, small, strict=True))
    box = (top / sy, left / sx, bottom / sy, right / sx)
    if source is None:
        # the part of the source that the window's pixels reach: the filter's 2 pixels and one to spare
        y0, x0 = max(0, int(box[0]) - 3), max(0, int(box[1]) - 3)
        y1, x1 = min(small[0], int(box[2]) + 4), min(small[1], int(box[3]) + 4)
        source = bicubic(cut(target, (0, 0, *size)), (y1 - y0, x1 - x0), (y0 * sy, x0 * sx, y1 * sy, x1 * sx))
        box = (box[0] - y0, box[1] - x0, box[2] - y0, box[3] - x0)
    return bicubic(source, (bottom - top, right - left), box)


def bicubic(values: np.ndarray, size: Size, box: tuple[float, float, float, float]) -> np.ndarray:
    """Pillow's BICUBIC of the box (top, left, bottom, right) of [C, H, W] to (height, width), channel by
    channel.

    uint8 stays uint8, as Pillow rounds it; other dtypes are resized in float32 (its mode F) and keep their
    range.
    """
    top, left, bottom, right = box
    # Pillow converts the whole picture: give it the part that the filter can reach
    reach = 2 * max(1.0, (bottom - top) / size[0], (right - left) / size[1]) + 2
    y0, x0 = max(0, int(top - reach)), max(0, int(left - reach))
    y1, x1 = (min(s, int(e + reach) + 1) for s, e in zip(values.shape[-2:], (bottom, right), strict=True))
    part = values[:, y0:y1, x0:x1]
    if values.dtype != np.uint8:
        part = part.astype(np.float32)
    resized = np.stack(
        [
            np.asarray(
                Image.fromarray(channel).resize(
                    (size[1], size[0]),
                    Image.Resampling.BICUBIC,
                    (left - x0, top - y0, right - x0, bottom - y0),
                )
            )
            for channel in np.ascontiguousarray(part)
        ]
    )
    if values.dtype == np.uint16:
        return resized.round().clip(0, 65535).astype(np.uint16)
    return resized if values.dtype == np.uint8 else resized.clip(-1, 1)


def tensor(values: np.ndarray) -> Tensor:
    """float32 in [-1, 1]: value / levels * 2 - 1 where they are integers."""
    result = torch.from_numpy(values.astype(np.float32))
    if values.dtype == np.float32:
        return result
    return result.div_(np.iinfo(values.dtype).max).mul_(2).sub_(1)


def symmetric(values: Tensor, symmetry: int) -> Tensor:
    """One of the square's symmetries: bit 0 turns left and right, bit 1 top and bottom, bit 2 rows and
    columns.
    """
    flips = [dim for bit, dim in ((1, -1), (2, -2)) if symmetry & bit]
    values = values.flip(flips) if flips else values
    return values.transpose(-1, -2).contiguous() if symmetry & 4 else values


# Order


class Order(Sampler[tuple[int, int]]):
    """Keys (epoch, index) of an endless stream: each epoch a permutation of the pictures that (seed, epoch)
    gives.

    Iteration i takes the positions [i G, (i + 1) G) of the stream, G = world * batch; of them rank r takes
    those from r * batch on, so that any number of ranks sees the same global batches. `start` is the
    iteration to begin with.
    """

    def __init__(self, count: int, batch: int, *, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch, self.seed, self.start, self.rank, self.world = (
            count,
            batch,
            seed,
            start,
            rank,
            world,
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start * self.world * self.batch
        epoch, permutation = -1, torch.empty(0)
        while True:
            first = position + self.rank * self.batch
            for p in range(first, first + self.batch):
                if p // self.count != epoch:
                    epoch = p // self.count
                    generator = torch.Generator().manual_seed(noise.signed64((self.seed << 32) + epoch))
                    permutation = torch.randperm(self.count, generator=generator)
                yield epoch, int(permutation[p % self.count])
            position += self.world * self.batch
