"""The model that a run begins with: random weights, or given ones that agree with the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..schedule import Schedule
from ..unet import UNet
from ..weights import Model, Structure, Target
from .config import TrainConfig

# the model's options, and what they are where a run begins with none; checked against the model that there is
FRESH: dict[str, Any] = dict(scale=4.0, channels=32, multipliers=(1, 2, 4, 4), blocks=2, attention=(), groups=8)
FRESH |= dict(dropout=0.0, image_channels=3, variant="sr3", target="image", k=1.0, clip=1.0, level="sqrt_gamma")
FRESH |= dict(schedule="linear", T=2000, beta_start=1e-6, beta_end=1e-2)


def fresh(config: TrainConfig) -> Model:
    """A model with random weights, as the configuration describes it; they are torch's, which is seeded with
    config.seed.
    """
    torch.manual_seed(config.seed)
    given = given_options(config)
    o = FRESH | ({"level": "t"} if given.get("variant") == "ddpm" else {}) | given
    if o["target"] == "image" and (odd := given.keys() & {"k", "clip"}):
        raise ValueError(f"{' and '.join(sorted(odd))} are of a residual, and the target is the image")
    sides = [config.crop // 2**i for i in range(len(o["multipliers"]))]
    if odd := set(o["attention"]) - set(sides):
        raise ValueError(f"attention must be at sides of the levels, {sides}: got {sorted(odd)}")
    unet = UNet(
        channels=o["channels"],
        multipliers=o["multipliers"],
        blocks=o["blocks"],
        attention=o["attention"],
        groups=o["groups"],
        dropout=o["dropout"],
        image_size=config.crop,
        in_channels=2 * o["image_channels"],
        out_channels=o["image_channels"],
        variant=o["variant"],
    )
    schedule = Schedule.named(o["schedule"], o["T"], o["beta_start"], o["beta_end"])
    return Model(unet, schedule, Target(o["target"], o["k"], o["clip"]), o["scale"], o["level"])


def given_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the model that are not left to the weights."""
    given = {name: value for name in FRESH if (value := getattr(config, name)) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def agreeing(config: TrainConfig, model: Model) -> Model:
    """The model, its scale known. ValueError where an option that is given is not the model's."""
    network, schedule, given = model.unet.config, model.schedule.config, given_options(config)
    # attention is counted from the crop's side, wherever the model counts from
    sides = [config.crop // 2**i for i in range(len(network["multipliers"]))]
    if "attention" in given:
        given["attention"] = tuple(side for side in sides if side in given["attention"])
    has = network | {
        "attention": tuple(sides[i] for i in Structure.of_config(network).attention),
        "image_channels": network["out_channels"],
        "scale": model.scale or config.scale,
        "target": model.target.kind,
        "k": model.target.k,
        "clip": model.target.clip,
        "schedule": schedule.get("name", "betas of its own"),
        "T": model.schedule.T,
        "beta_start": schedule.get("start", model.schedule.betas[0].item()),
        "beta_end": schedule.get("end", model.schedule.betas[-1].item()),
        "level": model.level,
    }
    for name, value in given.items():
        if value != has[name]:
            raise ValueError(f"{name} must be that of the weights, {has[name]!r}, or left out: got {value!r}")
    if has["scale"] is None:
        raise ValueError("these weights do not say how much they enlarge: give the scale")
    return replace(model, scale=has["scale"])
