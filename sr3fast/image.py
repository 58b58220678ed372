"""Pictures and tensors: files in and out, Pillow's bicubic, 8-bit rounding.

Tensors are float32 [C, H, W] (or [B, C, H, W]) in [-1, 1]. A `Photo` is a picture taken apart into what
the network sees (gray or RGB, 8 or 16 bits) and what is put back afterwards (alpha, ICC profile, EXIF, dpi).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 2**27
"""Pictures with more pixels than this (11585 x 11585) are refused, before they are decoded or made."""

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".webp", ".avif", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".tga", ".dds", ".pcx", ".psd", ".ico", ".qoi", ".sgi"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""What counts as a picture in a folder: not all that Pillow registers, among them .pdf, .h5, .mpg and .eps."""

_GRAY = ("1", "L", "LA", "La")
_GRAY_16 = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_BROKEN = (  # what Pillow raises for a file that it cannot decode
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, ArithmeticError),
    AttributeError,
    *(struct.error, zlib.error),
)

_SAVED_AS: dict[str, dict[str, Any]] = {  # Pillow's own quality, 75, shows
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}

_Tag = ExifTags.Base
_TURNS = {  # an orientation's; ImageOps.exif_transpose writes the old EXIF anew, and breaks on an odd tag
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270},
    **{7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90},
}
_OF_THE_PHOTOGRAPH = (
    *(_Tag.ImageDescription, _Tag.Make, _Tag.Model, _Tag.Software, _Tag.DateTime, _Tag.Artist, _Tag.Copyright),
    *(_Tag.Rating, _Tag.XPTitle, _Tag.XPComment, _Tag.XPAuthor, _Tag.XPKeywords, _Tag.XPSubject),
)
_OF_THE_OLD_FILE = {  # pixel dimensions and places, and blocks whose offsets hold in it alone
    *(_Tag.ExifImageWidth, _Tag.ExifImageHeight, _Tag.SubjectLocation, 0x9214),  # SubjectArea
    *(_Tag.FocalPlaneXResolution, _Tag.FocalPlaneYResolution, _Tag.FocalPlaneResolutionUnit),
    *(_Tag.MakerNote, ExifTags.IFD.Interop),
}
_WITH_ORIENTATION = (
    "exif",
    "Raw profile type exif",
    "xmp",
    "XML:com.adobe.xmp",
    "Raw profile type xmp",
)  # of Image.info
_EXIF_BYTES = 65533  # of a JPEG's marker


class ImageError(ValueError):
    """A picture that cannot be used. The message is one line, names the file where there is one, and says what to do.

    path: the file, or None.
    """

    def __init__(self, rule: str, path: str | os.PathLike | None = None):
        super().__init__(rule if path is None else f"{os.fspath(path)}: {rule}")
        self.path = path


# Files


@contextlib.contextmanager
def naming(picture: object) -> Iterator[None]:
    """Within it, an ImageError names the picture's file, where it is one."""
    try:
        yield
    except ImageError as error:
        if error.path is not None or not isinstance(picture, str | os.PathLike):
            raise
        raise ImageError(str(error), picture) from error


def files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The pictures of a folder and its subfolders, in the order of their names; hidden ones are left out."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in suffixes and p.is_file() and not any(s[0] == "." for s in p.relative_to(folder).parts)
    )


def read(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """The picture in a file, or in what is opened in binary, decoded in full and turned as its EXIF orientation says.

    Of an animation, the first frame; of colours of 16 bits, 8, which a warning says once. Raises ImageError for what
    is not an image, is empty, is cut short, or has more than MAX_PIXELS pixels (nothing is decoded then), and OSError
    where the file cannot be opened.
    """
    with _opened(file) as picture:
        deep = picture.mode not in _GRAY_16 and any(_is_deep(tile[3]) for tile in getattr(picture, "tile", ()))
        picture.load()
        picture = _upright(picture, _turn(picture))
    if deep:
        _tell_that_bits_are_lost()
    return picture


def _is_deep(args: Any) -> bool:
    """Whether Pillow's decoder gets 16 bits a channel, by its arguments: a raw mode; of a PPM the largest value too."""
    raw, *rest = args if isinstance(args, tuple) else (args,)
    return re.search(r";16[BLN]$", str(raw)) is not None or any(isinstance(n, int) and n > 255 for n in rest[:1])


@functools.cache
def _tell_that_bits_are_lost() -> None:
    """Once."""
    warnings.warn("16 bits a channel are read as 8, Pillow's way (gray without alpha keeps its 16)", stacklevel=1)


def header(file: str | os.PathLike | IO[bytes]) -> tuple[tuple[int, int], int]:
    """(width, height) as `read` turns it, and channels (1 or 3) as a `Photo` has them, without decoding.

    Raises what `read` and `Photo.of` raise, as far as the header tells.
    """
    with _opened(file) as picture:
        exif = Image.Image.getexif(picture)  # not PngImageFile's, which decodes
        width, height = picture.size
        if isinstance(picture, TiffImagePlugin.TiffImageFile):  # some of Pillow's versions have turned its size already
            width, height = picture.tag_v2[_Tag.ImageWidth], picture.tag_v2[_Tag.ImageLength]
        size = (height, width) if exif.get(_Tag.Orientation) in (5, 6, 7, 8) else (width, height)
        return size, _channels(picture.mode)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What its EXIF orientation asks for."""
    try:
        return _TURNS.get(picture.getexif().get(_Tag.Orientation, 1))
    except Exception:  # a broken tag raises anything, and must not cost the picture
        return None


def _upright(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """A copy, turned, with what `_info` keeps of it."""
    info = _info(picture)
    picture = picture.copy() if turn is None else picture.transpose(turn)
    for name in _WITH_ORIENTATION:  # or it would be turned again
        picture.info.pop(name, None)
    picture.info.update(info)  # a copy of a TIFF has no EXIF of its own
    return picture


@contextlib.contextmanager
def _opened(file: str | os.PathLike | IO[bytes]) -> Iterator[Image.Image]:
    """The picture in a file, not yet decoded; what Pillow raises within becomes an ImageError."""
    with naming(file), contextlib.ExitStack() as stack:
        if isinstance(file, str | os.PathLike):
            file = stack.enter_context(open(file, "rb"))
        elif isinstance(file, io.TextIOBase):
            raise TypeError("a picture's file must be opened in binary: got one opened as text")
        try:
            try:
                file.seek(0)
            except (AttributeError, OSError):  # a stream
                file = io.BytesIO(file.read())
            if not file.read(1):
                raise ImageError("the file is empty (0 bytes): remove it or copy it again")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size is stricter
                picture = Image.open(file)
            check_size(picture.size)
            yield picture
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{error} Cut it into parts first") from error
        except UnidentifiedImageError as error:
            raise ImageError("not an image that Pillow can read: convert it to PNG or JPEG") from error
        except MemoryError as error:
            raise ImageError("too large for this machine's memory, or broken: cut it into parts") from error
        except _BROKEN as error:
            raise ImageError(f"cut short or broken ({_line(error)}): copy it again or convert it") from error


def check_size(size: tuple[int, int], name: str = "") -> None:
    """Raise ImageError where a picture of (width, height) has more than MAX_PIXELS pixels."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}{width} x {height} is {width * height / 1e6:.0f} million pixels, at most "
            f"{MAX_PIXELS / 1e6:.0f} million are taken: cut it into parts first"
        )


def check_format(path: str | Path, mode: str) -> None:
    """Raise ImageError where the file format that the suffix of `path` names cannot hold Pillow's `mode`."""
    name, file = _format(path), io.BytesIO()
    try:
        Image.new(mode, (8, 8), 30000 if mode in _GRAY_16 else 0).save(file, format=name)
        # some are saved in 8 bits without a word
        held = mode not in _GRAY_16 or np.asarray(Image.open(file)).max() > 255
    except (OSError, KeyError, ValueError) as error:
        raise ImageError(f"{name} cannot hold a picture of mode {mode}: save it as .png", path) from error
    if not held:
        raise ImageError(f"{name} cannot hold a picture of 16 bits: save it as .png", path)


def write(picture: Image.Image, path: str | Path, **options: object) -> None:
    """Save a picture under a temporary name and rename it: a file of that name is whole, or is not there.

    `options` are those of Image.save; by default JPEG, WebP and AVIF are of quality 95, and the ICC profile,
    EXIF and dpi in `picture.info` are kept where the format can hold them. Raises ImageError for a suffix that
    names no format, or one that cannot hold 16 bits; OSError where it cannot be written.
    """
    name = _format(path)
    if picture.mode in _GRAY_16:
        check_format(path, picture.mode)
    options = _SAVED_AS.get(name, {}) | _info(picture) | options
    with atomic(path) as temporary:
        picture.save(temporary, format=name, **options)


def check_writable(path: str | Path) -> None:
    """Raise OSError where no file of that name could be written; nothing is left behind."""
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = Path(path).absolute().parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it to `path` at the end, remove it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    short = f"{zlib.crc32(os.fsencode(path.name)):08x}"  # a name with something added may be too long
    temporary = path.with_name(f".{short}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "no space left on the disk: free some or write elsewhere", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    name = Image.registered_extensions().get(suffix)
    if name is None or name not in Image.SAVE:
        raise ImageError(f"{suffix or 'no suffix'} names no image format to write: use .png", path)
    return name


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# What a file holds beside its pixels


def _info(picture: Image.Image) -> dict[str, Any]:
    """What a result keeps of its source, under the names of Image.info and Image.save: icc_profile, exif, dpi."""
    info = {"icc_profile": picture.info.get("icc_profile"), "exif": _exif(picture), "dpi": _dpi(picture)}
    return {name: value for name, value in info.items() if value}


def _exif(picture: Image.Image) -> bytes | None:
    """The EXIF of the photograph (camera, exposure, date, place), less what describes the old file.

    That is its orientation, pixel dimensions, layout and thumbnail. None where there is none, or none that can be kept.
    """
    try:
        source, kept = picture.getexif(), Image.Exif()
        kept.update({tag: source[tag] for tag in _OF_THE_PHOTOGRAPH if tag in source and _is_kept_whole(source[tag])})
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            values = source.get_ifd(ifd).items()
            tags = {tag: value for tag, value in values if tag not in _OF_THE_OLD_FILE and _is_kept_whole(value)}
            if tags:
                kept[ifd] = tags
        data = kept.tobytes() if len(kept) else None
    except Exception:  # a broken tag raises anything, and must not cost the picture
        return None
    return data if data and len(data) <= _EXIF_BYTES else None


def _is_kept_whole(value: object) -> bool:
    """Pillow writes a question mark for what is not ASCII: no name is better than a falsified one."""
    return not isinstance(value, str) or value.isascii()


def _dpi(picture: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = map(float, picture.info["dpi"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return (x, y) if 1 < x <= 65535 and 1 < y <= 65535 else None  # 1 is none in a TIFF, 65535 the most in a JPEG


# Pictures taken apart


@dataclass(frozen=True)
class Photo:
    """What the network sees of a picture, and what is put back.

    color: Pillow image of mode L (gray), RGB, or F (gray, 0 .. 65535, from 16 bits)
    alpha: mode L, or None
    info: what a file keeps beside its pixels, as in Pillow's info: icc_profile, exif (less orientation, pixel
        dimensions and thumbnail), dpi; each where there is one
    """

    color: Image.Image
    alpha: Image.Image | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, picture: Image.Image) -> Photo:
        """Take apart a picture of any of Pillow's modes, turned as its EXIF orientation says, if it still has one.

        Palettes become RGB; CMYK and LAB become sRGB (through the picture's own profile where it has one,
        which is then spent). Raises ImageError for mode F, whose range is not known.
        """
        picture.load()  # which turns a TIFF
        if (turn := _turn(picture)) is not None:
            picture = _upright(picture, turn)
        info, mode = _info(picture), picture.mode
        if mode in _GRAY_16:
            values = np.asarray(picture).astype(np.float32)
            if values.size and not 0 <= values.min() <= values.max() <= 65535:
                got = f"{values.min():.0f} .. {values.max():.0f}"
                raise ImageError(f"a picture of mode {mode} must hold 0 .. 65535: got {got}")
            return cls(Image.fromarray(values), None, info)
        gray = _channels(mode) == 1
        if mode in ("CMYK", "LAB"):
            return cls(_srgb(picture, info.pop("icc_profile", None)), None, info)
        if mode in ("La", "RGBa"):  # multiplied by alpha
            picture = picture.convert("LA" if gray else "RGBA")
        if mode == "P" and "transparency" in picture.info:  # with bytes of it, Pillow warns of what follows
            picture = picture.convert("RGBA")
        alpha = _alpha(picture, "LA" if gray else "RGBA")
        return cls(picture.convert("L" if gray else "RGB"), alpha, info)

    @classmethod
    def read(cls, file: str | os.PathLike | IO[bytes]) -> Photo:
        """`of` the picture in a file; see `read`."""
        with naming(file):
            return cls.of(read(file))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.color.size

    @property
    def mode(self) -> str:
        """Pillow's mode of the whole picture: L, LA, RGB, RGBA or I;16."""
        return "I;16" if self.color.mode == "F" else self.color.mode + ("A" if self.alpha else "")

    @property
    def levels(self) -> int:
        """The largest value: 255, or 65535."""
        return 65535 if self.color.mode == "F" else 255

    def resized(self, size: tuple[int, int]) -> Photo:
        """The same at (width, height), by Pillow's bicubic: in 8 bits, or in float for 16 bits."""
        alpha = self.alpha and bicubic(self.alpha, size)
        return replace(self, color=bicubic(self.color, size), alpha=alpha)

    def tensor(self, channels: int | None = None) -> torch.Tensor:
        """Float32 [C, H, W] in [-1, 1]; `channels` asks for 1, or for 3 (gray is repeated)."""
        values = to_tensor(self.color, self.levels)
        if channels in (None, values.shape[0]):
            return values
        if channels == 3 and values.shape[0] == 1:
            return values.expand(3, -1, -1).contiguous()
        raise ImageError(
            f"a network of {channels} channels cannot take a picture of {values.shape[0]}"
            + (": convert it to gray first" if channels == 1 else ": call Sampler with a tensor of your own")
        )

    def with_color(self, values: torch.Tensor) -> Image.Image:
        """The whole picture with these colours, [C, H, W] in [-1, 1]; those of a gray one are averaged."""
        if self.color.mode != "RGB":
            values = values.mean(0, keepdim=True)
        picture = to_picture(values, self.levels)
        if self.alpha:
            picture.putalpha(self.alpha)
        picture.info.update(self.info)
        return picture


def _channels(mode: str) -> int:
    """Of the colours of a picture of Pillow's `mode`; ImageError for mode F, whose range is not known."""
    if mode == "F":
        raise ImageError("a picture of mode F has no fixed range: scale it to 8 or 16 bits first")
    return 1 if mode in (*_GRAY, *_GRAY_16) else 3


def _alpha(picture: Image.Image, mode: str) -> Image.Image | None:
    if picture.mode in ("LA", "PA", "RGBA"):
        return picture.getchannel("A")
    if "transparency" not in picture.info:
        return None
    return picture.convert(mode).getchannel("A")


def _srgb(picture: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is None or picture.mode == "LAB":
        return picture.convert("RGB")
    try:
        profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ImageError(f"its ICC profile does not fit ({_line(error)}): convert it to RGB first") from error
    assert converted is not None  # None only where inPlace=True
    return converted


# Pictures as tensors


def to_tensor(picture: Image.Image, levels: int = 255) -> torch.Tensor:
    """Float32 [C, H, W] in [-1, 1]: value / levels * 2 - 1, of a picture of mode L, RGB, RGBA or F."""
    values = np.array(picture, dtype=np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(values)).div_(levels).mul_(2).sub_(1)


def quantize(values: torch.Tensor, levels: int = 255) -> torch.Tensor:
    """The integers that [-1, 1] is stored as, in float: clamp, (v + 1) / 2 * levels, round half to even."""
    return ((values.float().clamp(-1, 1) + 1) / 2 * levels).round_()


def to_picture(values: torch.Tensor, levels: int = 255) -> Image.Image:
    """Pillow's image of [C, H, W] in [-1, 1], C = 1 (mode L, or I;16 where levels is 65535) or 3 (RGB)."""
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"a picture is [1, H, W] or [3, H, W]: got {list(values.shape)}")
    dtype = np.uint8 if levels == 255 else np.uint16
    array = quantize(values.detach(), levels).cpu().numpy().astype(dtype)
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def bicubic(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's BICUBIC (antialiased where it shrinks) to (width, height)."""
    return picture.resize(size, Image.Resampling.BICUBIC)


def divisible(size: Sequence[int], scale: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest size, at most `size`, that is whole at 1/scale, and what it is there; the order of sides is kept."""
    a, b = (int(side / scale + 1e-9) for side in size)  # 66 / 1.1 falls short of 60
    return (round(a * scale), round(b * scale)), (a, b)


def resize(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The same filter on [B, C, H, W] or [C, H, W] to (height, width), without 8-bit rounding or clamp.

    Equivalent to: F.interpolate(values, size, mode="bicubic", antialias=True, align_corners=False)
    """
    batch = values if values.ndim == 4 else values[None]
    out = F.interpolate(batch, size, mode="bicubic", antialias=True, align_corners=False)
    return out if values.ndim == 4 else out[0]


def reflect_pad(values: torch.Tensor, multiple: int) -> torch.Tensor:
    """[..., H, W] made longer at the bottom and right to multiples of `multiple`, by reflection.

    About the last pixel, which is not repeated (unless it is the only one); a short side is reflected to and fro as
    often as needed.
    """
    for dim in (-2, -1):
        length = values.shape[dim]
        if length % multiple:
            period = max(2 * (length - 1), 1)
            place = torch.arange(-(-length // multiple) * multiple, device=values.device) % period
            values = values.index_select(dim, torch.minimum(place, period - place))
    return values
