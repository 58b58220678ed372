"""Their checkpoints: the network, Adam's state beside it."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...schedule import Schedule
from ...unet import UNet
from ...weights import Model, Structure, build, load_pickled
from .configs import read_config, resolve, scale_of
from .names import FREQUENCIES, REPOSITORY, our_name, renamed, their_name, variant_of


def load(path: str | Path, config: Mapping[str, Any] | str | Path | None = None) -> tuple[UNet, Schedule]:
    """Their checkpoint as (unet, schedule): ours to sample from, to train further, to save by weights.save.

        unet, schedule = load("I640000_E37_gen.pth")
        y_0 = Sampler(unet, schedule, solver="ddpm")(x)          # level="t" for their ddpm networks

    path: I{iter}_E{epoch}_gen.pth (or that without "_gen.pth", as "resume_state" in their configs has it), or
        the same tensors as .safetensors. Read without running pickled code.
    config: needed where the structure is none of CONFIGS, since norm_groups cannot be read from tensors:
        a name in CONFIGS, the path of their JSON file (// comments allowed), what it holds as a dict, or only
        {"norm_groups": 32} (UNet's own names will do too). Everything else is inferred; a config that
        contradicts the tensors is refused.

    The schedule is the one in the checkpoint (betas), that of training. The unet is float32, in evaluation
    mode, on the CPU.

    Raises FileNotFoundError; ValueError: a file of another kind, a pickle with more than tensors, a network
    of another structure (the first differing tensors, both shapes, the likely config), norm_groups unknown.
    """
    path = _checkpoint(path)
    given, betas = read_config(config)
    state = _read_state(path)
    try:
        theirs, buffers = _split(state)
        variant = variant_of(theirs)
        ours = renamed(theirs)
        structure = Structure.of_tensors(ours)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a network of {REPOSITORY}: {error}") from error
    config = resolve(structure, variant, given, path)
    unet = build(config, ours, str(path), named=lambda name: their_name(name, variant))
    if "betas" in buffers:
        schedule = Schedule.from_betas(buffers["betas"])
        if betas is not None and not _alike(betas, schedule):
            warnings.warn(
                f"the config's schedule, {betas}, is not the checkpoint's, {schedule}: this is the"
                " checkpoint's (for fewer steps keep it and give Sampler steps=)",
                stacklevel=2,
            )
    elif betas is not None:
        schedule = betas
    else:
        raise ValueError(f"{path} has no betas: pass as config= a config file of {REPOSITORY}, with its beta_schedule")
    return unet, schedule


def _alike(a: Schedule, b: Schedule) -> bool:
    return a.T == b.T and torch.allclose(a.betas, b.betas, rtol=1e-5, atol=0)


def model(path: str | Path, config: Mapping[str, Any] | str | Path | None = None, scale: float | None = None) -> Model:
    """Their checkpoint as a Model, to upscale with, to train further, to save: what `load` gives, with the level that
    the network is told and the scale.

        upscale("photo.png", model("I640000_E37_gen.pth", scale=8))

    path, config: as for `load`. scale: by default what the config says, in its datasets (l_resolution and
    r_resolution) or else at the end of its name (sr_sr3_16_128), or None: no checkpoint tells it.

    Raises as `load` does, and ValueError where scale and config contradict each other.
    """
    unet, schedule = load(path, config)
    said = scale_of(config)
    if None not in (scale, said) and scale != said:
        raise ValueError(f"the scale is the config's: got scale {scale:g}, and a config of {said:g}")
    return Model(unet, schedule, scale=said or scale, level="t" if unet.variant == "ddpm" else "sqrt_gamma")


def moments(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Adam's state in the _opt.pth beside a _gen.pth, by our parameters' names, for `training.train`.

    path: as for `load`. Each parameter has "step", "exp_avg", "exp_avg_sq". No pickled code is run.

    Raises FileNotFoundError: no _opt.pth; ValueError: the state of another network.
    """
    network = _checkpoint(path)
    file = network.with_name(network.name.removesuffix("_gen.pth") + "_opt.pth")
    if not file.is_file():
        raise FileNotFoundError(f"no optimizer state at {file}")
    try:
        saved = load_pickled(file)["optimizer"]["state"]
    except (pickle.UnpicklingError, ValueError, LookupError, TypeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is not an optimizer's state of {REPOSITORY}: {why}") from error
    # Adam numbers the parameters as the network lists them; the frequencies are a buffer
    theirs = {name: t for name, t in _split(_read_state(network))[0].items() if name != FREQUENCIES}
    if len(saved) != len(theirs):
        raise ValueError(f"{file} has the state of {len(saved)} parameters, {network} has {len(theirs)}")
    named = {}
    for (name, tensor), state in zip(theirs.items(), (saved[i] for i in sorted(saved)), strict=True):
        if state["exp_avg"].shape != tensor.shape:
            shapes = f"{list(state['exp_avg'].shape)}, not {list(tensor.shape)}"
            raise ValueError(f"{file} is of another network than {network}: {name} is {shapes}")
        moment = {key: state[key].float() for key in ("exp_avg", "exp_avg_sq")}
        named[our_name(name) or name] = {"step": torch.as_tensor(float(state["step"])), **moment}
    return named


def _checkpoint(path: str | Path) -> Path:
    path = Path(path)
    if path.name.endswith("_opt.pth"):
        raise ValueError(f"{path} holds the optimizer: the network is in {path.name[:-8]}_gen.pth")
    for candidate in (path, path.with_name(f"{path.name}_gen.pth")):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise ValueError(f"a checkpoint is a file, I..._E..._gen.pth: {path} is a folder")
    raise FileNotFoundError(f"no checkpoint at {path}, nor at {path}_gen.pth")


def _read_state(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors, however it is stored; no pickled code is run."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = load_pickled(path)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is not a file of torch.save, or damaged") from error
        raise ValueError(
            f"{path} was refused: besides tensors it pickles {refused[1]}, and sr3fast runs no pickled code."
            " Where it was made, save the tensors alone: torch.save(netG.state_dict(), path)"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or cut short: {error}") from error
    if isinstance(state, Mapping) and "optimizer" in state:
        raise ValueError(f"{path} holds an optimizer's state: the network is in the file that ends in _gen.pth")
    tensors = isinstance(state, Mapping) and all(isinstance(t, Tensor) for t in state.values())
    if not tensors or not state:
        raise ValueError(f"{path} must hold a state dict, names to tensors: got {_kind(state)}")
    return dict(state)


def _kind(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    other = [f"{name!r}: {type(t).__name__}" for name, t in state.items() if not isinstance(t, Tensor)]
    return f"a dict with {', '.join(other[:3])}" if other else "an empty dict"


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the network's tensors, the diffusion's buffers), whatever wrappers put before their names."""
    root = next((n[: -len("downs.0.weight")] for n in state if re.fullmatch(r"(.*\.)?downs\.0\.weight", n)), None)
    if root is None:
        raise ValueError(f"it has no denoise_fn.downs.0.weight (it begins with {', '.join(list(state)[:3])})")
    outer = root.removesuffix("denoise_fn.")
    network = {name.removeprefix(root): t for name, t in state.items() if name.startswith(root)}
    buffers = {
        name.removeprefix(outer): t
        for name, t in state.items()
        if root != outer and name.startswith(outer) and not name.startswith(root)
    }
    return network, buffers
