"""Weights on disk: a folder with config.json (network, schedule, target, defaults) and model.safetensors.

Nothing here runs pickled code. Checkpoints of Janspiry's code are read by `compat.janspiry`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import image
from .schedule import Schedule
from .solver import LEVELS
from .unet import UNet

__all__ = ["Model", "Structure", "Target", "build", "find", "load", "load_pickled", "matched", "save", "shipped"]

CONFIG, TENSORS = "config.json", "model.safetensors"
MODELS = Path(__file__).parent / "models"
VERSION = 1
KINDS = ("image", "residual")
# what an upscaler asks a card for
CARD: dict[str, type] = {"steps": int, "solver": str, "grid": str, "consistency": bool, "scales": list}


@dataclass(frozen=True)
class Target:
    """What y_0 is to the weights: the image (SR3), or the scaled residual of SRDiff (Li et al. 2021).

    "image":    y_0 = image
    "residual": y_0 = clip(k (image - x)), image = x + y_0 / k

    kind: one of KINDS; k: above 0, what brings residuals to the range of an image; clip: bound on abs(y_0)
    of a residual in training, and the sampler's clip of y_0_hat.
    """

    kind: str = "image"
    k: float = 1.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a target is one of {', '.join(KINDS)}: got {self.kind!r}")
        for name, value in (("k", self.k), ("clip", self.clip)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"a target's {name} must be above 0 and finite: got {value!r}")

    def encode(self, image: Tensor, x: Tensor | None) -> Tensor:
        """y_0 of an image, both [B, C, H, W]; x, the source, may be None where the target is the image."""
        if self.kind == "image":
            return image
        return (self.k * (image - self._source(x, image))).clamp(-self.clip, self.clip)

    def decode(self, y_0: Tensor, x: Tensor | None) -> Tensor:
        """The image of y_0, not clamped: the inverse of `encode` where that clips nothing."""
        if self.kind == "image":
            return y_0
        return self._source(x, y_0) + y_0 / self.k

    def _source(self, x: Tensor | None, image: Tensor) -> Tensor:
        if x is None or x.shape != image.shape:
            got = None if x is None else list(x.shape)
            raise ValueError(f"a residual needs x of the image's shape {list(image.shape)}: got {got}")
        return x


@dataclass
class Model:
    """A network with all that sampling from it needs.

    scale: enlargement it was trained for, or None; level: what it is conditioned on ("sqrt_gamma", "gamma",
    "t"); card: its own defaults for the sampler (steps, solver, grid, consistency, ...), JSON-able.
    """

    unet: UNet
    schedule: Schedule
    target: Target = field(default_factory=Target)
    scale: float | None = None
    level: str = "sqrt_gamma"
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}: got {self.level!r}")
        if self.scale is not None and not 1 <= self.scale < float("inf"):
            raise ValueError(f"scale must be at least 1: got {self.scale}")
        if (self.level == "t") != (self.unet.variant == "ddpm"):
            raise ValueError(f"a {self.unet.variant} network is not conditioned on level={self.level!r}")


# ------------------------------------------------------------------------------------------- folders


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.parent.name for p in MODELS.glob(f"*/{CONFIG}"))


def find(name: str | Path) -> Path:
    """The folder of a name in `shipped`, or of a path. FileNotFoundError, ValueError: no weights there."""
    if str(name) in shipped():
        return MODELS / str(name)
    folder = Path(name)
    if folder.is_file():
        raise ValueError(
            f"weights are a folder with {CONFIG} and {TENSORS}: got the file {folder}"
            " (sr3fast.compat.janspiry.model reads a _gen.pth)"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no weights at {str(name)!r}: give the path of a folder with {CONFIG} and {TENSORS}, "
            f"or a name that ships: {', '.join(shipped()) or 'none in this build'}"
        )
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"weights are a folder with {CONFIG} and {TENSORS}: {folder} has no {file}")
    return folder


def describe(model: Model) -> dict[str, Any]:
    """All of a model but its tensors, in types that JSON holds."""
    return {
        "unet": model.unet.config,
        "schedule": model.schedule.config,
        "target": asdict(model.target),
        "scale": model.scale,
        "level": model.level,
        "card": model.card,
    }


def described(config: Mapping[str, Any], unet: UNet) -> Model:
    """The model of `describe`, around its network. ValueError: a card that no upscaler can read."""
    card = config["card"]
    if not isinstance(card, dict):
        raise ValueError(f"a card is a dict: got {card!r}")
    for name, kind in CARD.items():
        if not isinstance(card.get(name), kind | None):
            raise ValueError(f"a card's {name} must be of type {kind.__name__}: got {card[name]!r}")
    schedule, target = Schedule.from_config(config["schedule"]), Target(**config["target"])
    return Model(unet, schedule, target, config["scale"], config["level"], config["card"])


def save(folder: str | Path, model: Model, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors; each is complete or as it was before.

    dtype: store the tensors in it (float16 halves a download); by default as they are.
    Raises OSError where there is no room or no permission, TypeError for a card that JSON cannot hold.
    """
    text = json.dumps({"format": VERSION, **describe(model)}, indent=2, allow_nan=False) + "\n"
    state = model.unet.state_dict()
    tensors = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in state.items()}
    folder = Path(folder)
    # the outer one is renamed last: a folder with a new config.json has its tensors
    with image.atomic(folder / CONFIG) as config_file, image.atomic(folder / TENSORS) as weights_file:
        try:
            save_file(tensors, weights_file)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"cannot write {folder / TENSORS}: {error}") from error
        config_file.write_text(text, encoding="utf-8")


def load(name: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Model:
    """The model of a folder that `save` wrote, or of a name that ships; in evaluation mode, on the CPU.

    dtype: of the weights in memory; None keeps the file's.
    Raises FileNotFoundError and ValueError: no such weights, or files that do not fit each other.
    """
    folder = find(name)
    config = _read_config(folder / CONFIG)
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged or not a safetensors file: {error}") from error
    try:
        unet = build(config["unet"], tensors, str(folder / TENSORS), dtype=dtype)
    except (TypeError, AttributeError) as error:  # arguments that no constructor knows
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from error
    try:
        return described(config, unet)
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from error


def load_pickled(path: Path) -> Any:
    """What torch.save wrote, on the CPU; no pickled code is run.

    Raises pickle.UnpicklingError: it is no such file, or holds more than tensors and plain values; ValueError: it is
    damaged; OSError: it cannot be opened.
    """
    path.open("rb").close()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or cut short: {why}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != VERSION:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{path} must have format {VERSION}, as weights.save writes it: got {found!r}")
    missing = [k for k in ("unet", "schedule", "target", "scale", "level", "card") if k not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return config


# ------------------------------------------------------------------------- tensors against a network


@dataclass(frozen=True)
class Structure:
    """What a UNet's tensors tell about it: all its arguments but groups, image_size, dropout and variant.

    attention: the levels (0 is the full resolution) that have it.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    in_channels: int
    out_channels: int

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Structure:
        """From UNet's arguments, complete."""
        multipliers = tuple(config["multipliers"])
        resolutions = [config["image_size"] // 2**i for i in range(len(multipliers))]
        return cls(
            channels=config["channels"],
            multipliers=multipliers,
            blocks=config["blocks"],
            attention=tuple(i for i, side in enumerate(resolutions) if side in config["attention"]),
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Structure:
        """From a state dict with UNet's names. ValueError where it is not one of a UNet."""
        try:
            channels, in_channels = tensors["conv_in.weight"].shape[:2]
            out_channels = tensors["conv_out.weight"].shape[0]
            levels: list[list[int]] = [[]]  # indices of each level's blocks
            count = len({name.split(".")[1] for name in tensors if name.startswith("downs.")})
            for i in range(count):
                if f"downs.{i}.conv.weight" in tensors:
                    levels.append([])
                else:
                    levels[-1].append(i)
            widths = [tensors[f"downs.{level[-1]}.conv1.weight"].shape[0] for level in levels]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"these are not the tensors of a UNet: {error} is missing") from error
        return cls(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=len(levels[0]),
            attention=tuple(i for i, level in enumerate(levels) if f"downs.{level[0]}.attention.qkv.weight" in tensors),
            in_channels=in_channels,
            out_channels=out_channels,
        )

    def __str__(self) -> str:
        return (
            f"channels={self.channels}, multipliers={self.multipliers}, blocks={self.blocks}, "
            f"attention on levels {self.attention}, in_channels={self.in_channels}, "
            f"out_channels={self.out_channels}"
        )


def build(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    named: Callable[[str], str] = str,
    dtype: torch.dtype | None = torch.float32,
) -> UNet:
    """UNet(**config) holding `tensors`, in dtype unless that is None, in evaluation mode; see `matched`."""
    unet = matched(config, tensors, source, named=named)
    ready = {name: t.to(dtype or t.dtype).contiguous() for name, t in tensors.items()}
    unet.load_state_dict(ready, assign=True)
    return unet.eval()


def matched(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    named: Callable[[str], str] = str,
) -> UNet:
    """UNet(**config) on the meta device, after a check that `tensors` fit it.

    source: says in errors where the tensors are from; named: gives a tensor's name there, where not ours.
    ValueError: the first differing tensors, both shapes, and the likely config.
    """
    try:
        with torch.device("meta"):
            unet = UNet(**config)
    except ValueError as error:
        raise ValueError(f"{source} has a config that no network has: {error}") from error
    expected = {name: tuple(t.shape) for name, t in unet.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        raise ValueError(f"{source} does not fit the network: {_differences(expected, found, named)}")
    whole = [name for name, t in tensors.items() if not t.is_floating_point()]
    if whole:
        raise ValueError(f"{source} must hold floats: {whole[0]} is {tensors[whole[0]].dtype}")
    return unet


def _differences(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    named: Callable[[str], str],
) -> str:
    def line(name: str) -> str:
        if name not in found:
            return f"{named(name)} {list(expected[name])} is missing"
        if name not in expected:
            return f"{named(name)} {list(found[name])} is one too many"
        return f"{named(name)} is {list(found[name])}, not {list(expected[name])}"

    differing = [n for n in [*expected, *found] if expected.get(n) != found.get(n)]
    differing = list(dict.fromkeys(differing))
    text = "; ".join(line(name) for name in differing[:3])
    if len(differing) > 3:
        text += f"; and {len(differing) - 3} more"
    try:
        likely = Structure.of_tensors({name: torch.empty(s, device="meta") for name, s in found.items()})
    except ValueError:
        return text
    return f"{text} (its tensors look like {likely})"
