"""Their configs, and what they say of a network whose tensors do not say it."""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...schedule import Schedule
from ...unet import UNet
from ...weights import Structure
from .names import REPOSITORY

# the configs that come with that repository, as arguments of UNet; its norm_groups is 32 where absent
CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sr_sr3_16_128": {},
        "sr_sr3_64_512": {
            "multipliers": (1, 2, 4, 8, 16),
            "blocks": 1,
            "attention": (),
            "groups": 16,
            "image_size": 512,
            "dropout": 0.0,
        },
        "sample_sr3_128": {"in_channels": 3},
        "sr_ddpm_16_128": {"multipliers": (1, 1, 2, 2, 4, 4), "variant": "ddpm"},
        "sample_ddpm_128": {"multipliers": (1, 1, 2, 2, 4, 4), "variant": "ddpm", "in_channels": 3},
    }
)

DEFAULTS = {p.name: p.default for p in inspect.signature(UNet).parameters.values()}

# their names in a config -> UNet's arguments
OPTIONS = {
    "inner_channel": "channels",
    "channel_multiplier": "multipliers",
    "res_blocks": "blocks",
    "attn_res": "attention",
    "norm_groups": "groups",
    "dropout": "dropout",
    "in_channel": "in_channels",
    "out_channel": "out_channels",
    "image_size": "image_size",
    "which_model_G": "variant",
}

THEIR_OPTION = {ours: theirs for theirs, ours in OPTIONS.items()}


def read_config(config: Mapping[str, Any] | str | Path | None) -> tuple[dict[str, Any], Schedule | None]:
    """What a config says, as arguments of UNet, and the schedule it would sample with."""
    if config is None:
        return {}, None
    if isinstance(config, str) and config in CONFIGS:
        return {**DEFAULTS, **CONFIGS[config]}, None
    if isinstance(config, str | Path):
        config = _read_json(Path(config))
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a name, a path or a dict: got {type(config).__name__}")
    model = config.get("model") or (config if config.get("unet") else None)
    if model is None:
        unknown = [name for name in config if name not in OPTIONS and name not in DEFAULTS]
        if unknown:
            raise ValueError(f"a config has 'model', or some of {', '.join(OPTIONS)}: got {', '.join(unknown)}")
        return {OPTIONS.get(name, name): value for name, value in config.items()}, None
    options = {OPTIONS[name]: v for name, v in (model.get("unet") or {}).items() if name in OPTIONS}
    options["groups"] = options.get("groups") or 32  # what their code takes where it is absent or null
    image_size = (model.get("diffusion") or {}).get("image_size")
    if image_size is not None:
        options["image_size"] = image_size
    if model.get("which_model_G") is not None:
        options["variant"] = model["which_model_G"]
    return options, _schedule_of(model.get("beta_schedule"))


def scale_of(config: Mapping[str, Any] | str | Path | None) -> float | None:
    """How much a network of this config enlarges, where that says it."""
    name = config if isinstance(config, str | Path) else ""
    if name and name not in CONFIGS:
        config = _read_json(Path(name))
    datasets = config.get("datasets") or {} if isinstance(config, Mapping) else {}
    for phase in ("train", "val"):
        low, high = ((datasets.get(phase) or {}).get(f"{side}_resolution") for side in "lr")
        if low and high:
            return high / low
    sides = re.search(r"_(\d+)_(\d+)$", Path(name).stem)
    return int(sides[2]) / int(sides[1]) if sides and int(sides[2]) > int(sides[1]) else None


def _schedule_of(phases: Any) -> Schedule | None:
    phase = (phases or {}).get("val") or (phases or {}).get("train")
    if not phase:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not be the one that is used
        if lacking := [name for name in ("schedule", "n_timestep") if name not in phase]:
            raise ValueError(f"a beta_schedule has schedule and n_timestep: this one lacks {' and '.join(lacking)}")
        return Schedule.named(
            phase["schedule"],
            phase["n_timestep"],
            phase.get("linear_start") or 1e-6,
            phase.get("linear_end") or 1e-2,
        )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"config {str(path)!r} is neither a file nor one of {', '.join(CONFIGS)}")
    # their parser cuts each line at the first //
    text = "\n".join(line.split("//")[0] for line in path.read_text(encoding="utf-8").splitlines())
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON with // comments: {error}") from error


def resolve(structure: Structure, variant: str, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """UNet's arguments: the structure from the tensors, groups and image_size from the config or CONFIGS."""
    _check_given(structure, variant, given, path)
    known = next(
        (
            full
            for full in ({**DEFAULTS, **options} for options in CONFIGS.values())
            if Structure.of_config(full) == structure and full["variant"] == variant
        ),
        {},
    )
    groups = given.get("groups") or known.get("groups")
    if groups is None:
        raise ValueError(
            f"{path}: norm_groups cannot be read from a checkpoint, and no config of {REPOSITORY} has this"
            f" structure ({structure}). Give the path of its JSON file as config (--config), or in Python"
            ' config={"norm_groups": 32} with its norm_groups (32 where it has none)'
        )
    multiple = 2 ** (len(structure.multipliers) - 1)
    # it only places the attention, which the tensors show: any multiple will do
    image_size = given.get("image_size") or known.get("image_size") or 128
    image_size = math.ceil(image_size / multiple) * multiple
    return {
        "channels": structure.channels,
        "multipliers": structure.multipliers,
        "blocks": structure.blocks,
        "attention": tuple(image_size // 2**level for level in structure.attention),
        "groups": groups,
        "dropout": given.get("dropout", known.get("dropout", 0.0)),
        "image_size": image_size,
        "in_channels": structure.in_channels,
        "out_channels": structure.out_channels,
        "variant": variant,
    }


def _check_given(structure: Structure, variant: str, given: Mapping[str, Any], path: Path) -> None:
    found: dict[str, Any] = {
        "variant": variant,
        "channels": structure.channels,
        "multipliers": structure.multipliers,
        "blocks": structure.blocks,
        "in_channels": structure.in_channels,
        "out_channels": structure.out_channels,
    }
    for name, value in found.items():
        said = given.get(name)
        said = tuple(said) if isinstance(said, list) else said
        if said is not None and said != value:
            theirs = THEIR_OPTION[name]
            raise ValueError(f"{path} is not of that config: {theirs} is {said} there and {value} in the tensors")
    if "attention" in given and given.get("image_size"):
        sides = [given["image_size"] // 2**level for level in range(len(structure.multipliers))]
        levels = tuple(level for level, side in enumerate(sides) if side in given["attention"])
        if levels != structure.attention:
            raise ValueError(
                f"{path} is not of that config: attn_res {list(given['attention'])} at image_size"
                f" {given['image_size']} is attention on levels {levels}, not on {structure.attention}"
            )
