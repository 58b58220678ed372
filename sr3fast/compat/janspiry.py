"""Checkpoints and objects of Janspiry/Image-Super-Resolution-via-Iterative-Refinement, most users' SR3 code.

unet, schedule = load("I640000_E37_gen.pth")        their weights in our network
model("I640000_E37_gen.pth", scale=8)               the same as a weights.Model, for upscale and train
accelerate(diffusion)                               their object, sampling with our loop
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import noise, ops
from ..sampler import Sampler
from ..schedule import Schedule
from ..unet import UNet, evaluation_mode
from ..weights import Model, Structure, build, load_pickled, matched

__all__ = ["CONFIGS", "accelerate", "load", "model", "moments"]

REPOSITORY = "Janspiry's SR3 code"

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

# ------------------------------------------------------------------------------------------- names

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

# their module -> ours
MODULES = {
    "noise_level_mlp.1": "embedding.linear1",
    "noise_level_mlp.3": "embedding.linear2",
    "time_mlp.1": "embedding.linear1",
    "time_mlp.3": "embedding.linear2",
    "downs.0": "conv_in",
    "final_conv.block.0": "norm_out",
    "final_conv.block.3": "conv_out",
}
# the same inside downs.i, mid.i and ups.i
INNER_MODULES = {
    "res_block.noise_func.noise_func.0": "noise",
    "res_block.mlp.1": "noise",
    "res_block.block1.block.0": "norm1",
    "res_block.block1.block.3": "conv1",
    "res_block.block2.block.0": "norm2",
    "res_block.block2.block.3": "conv2",
    "res_block.res_conv": "skip",
    "attn.norm": "attention.norm",
    "attn.qkv": "attention.qkv",
    "attn.out": "attention.out",
    "conv": "conv",
}
FREQUENCIES = "time_mlp.0.inv_freq"


def _our_name(theirs: str) -> str | None:
    """UNet's name of a parameter of their network, or None where it has none."""
    module, _, leaf = theirs.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{leaf}"
    match = re.fullmatch(r"(downs|mid|ups)\.(\d+)\.(.+)", module)
    if match is None or match[3] not in INNER_MODULES:
        return None
    i = int(match[2]) - (match[1] == "downs")  # their downs.0 is our conv_in
    return f"{match[1]}.{i}.{INNER_MODULES[match[3]]}.{leaf}"


def _their_name(ours: str, variant: str) -> str:
    """The inverse of _our_name."""
    embedding, noise = {"sr3": ("noise_level_mlp", "noise_func"), "ddpm": ("time_mlp", "mlp")}[variant]
    modules = {o: t for t, o in MODULES.items() if not t.endswith(("mlp.1", "mlp.3")) or embedding in t}
    inner = {o: t for t, o in INNER_MODULES.items() if o != "noise" or f".{noise}." in t}
    module, _, leaf = ours.rpartition(".")
    if module in modules:
        return f"{modules[module]}.{leaf}"
    match = re.fullmatch(r"(downs|mid|ups)\.(\d+)\.(.+)", module)
    if match is None or match[3] not in inner:
        return ours
    i = int(match[2]) + (match[1] == "downs")
    return f"{match[1]}.{i}.{inner[match[3]]}.{leaf}"


def _variant(names: Mapping[str, Any]) -> str:
    for prefix, variant in (("noise_level_mlp.", "sr3"), ("time_mlp.", "ddpm")):
        if any(name.startswith(prefix) for name in names):
            return variant
    raise ValueError(f"it has neither noise_level_mlp nor time_mlp, the noise embeddings of {REPOSITORY}")


def _renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their network's tensors under our names. ValueError: a tensor their networks do not have."""
    ours = {}
    for name, tensor in theirs.items():
        if name == FREQUENCIES:
            _check_frequencies(tensor)
            continue
        our_name = _our_name(name)
        if our_name is None:
            raise ValueError(f"{name} {list(tensor.shape)} is no tensor of the networks of {REPOSITORY}")
        ours[our_name] = tensor
    return ours


def _check_frequencies(saved: Tensor) -> None:
    n = saved.numel()
    ours = torch.exp(torch.arange(n, dtype=torch.float64) * (-math.log(1e4) / n))
    if not torch.allclose(saved.detach().cpu().double(), ours, rtol=1e-5, atol=0):
        raise ValueError(f"{FREQUENCIES} must be 10000^(-i/n), i = 0..{n - 1}: these are other frequencies")


# ----------------------------------------------------------------------------------------- checkpoints


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
    given, betas = _read_config(config)
    state = _read_state(path)
    try:
        theirs, buffers = _split(state)
        variant = _variant(theirs)
        ours = _renamed(theirs)
        structure = Structure.of_tensors(ours)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a network of {REPOSITORY}: {error}") from error
    config = _resolve(structure, variant, given, path)
    unet = build(config, ours, str(path), named=lambda name: _their_name(name, variant))
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


def model(path: str | Path, config: Mapping[str, Any] | str | Path | None = None, scale: float | None = None) -> Model:
    """Their checkpoint as a Model, to upscale with, to train further, to save: what `load` gives, with the level that
    the network is told and the scale.

        upscale("photo.png", model("I640000_E37_gen.pth", scale=8))

    path, config: as for `load`. scale: by default what the config says, in its datasets (l_resolution and
    r_resolution) or else at the end of its name (sr_sr3_16_128), or None: no checkpoint tells it.

    Raises as `load` does, and ValueError where scale and config contradict each other.
    """
    unet, schedule = load(path, config)
    said = _scale(config)
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
        named[_our_name(name) or name] = {"step": torch.as_tensor(float(state["step"])), **moment}
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


# --------------------------------------------------------------------------------------------- configs


def _read_config(config: Mapping[str, Any] | str | Path | None) -> tuple[dict[str, Any], Schedule | None]:
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


def _scale(config: Mapping[str, Any] | str | Path | None) -> float | None:
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


def _alike(a: Schedule, b: Schedule) -> bool:
    return a.T == b.T and torch.allclose(a.betas, b.betas, rtol=1e-5, atol=0)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"config {str(path)!r} is neither a file nor one of {', '.join(CONFIGS)}")
    # their parser cuts each line at the first //
    text = "\n".join(line.split("//")[0] for line in path.read_text(encoding="utf-8").splitlines())
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON with // comments: {error}") from error


def _resolve(structure: Structure, variant: str, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
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


# ------------------------------------------------------------------------------------------ accelerate


def accelerate(
    diffusion: Any,
    *,
    solver: str | None = None,
    steps: int | None = None,
    rng: str = "noise_v1",
    seed: int | None = None,
    strict: bool = False,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Replace super_resolution and sample of their GaussianDiffusion by ours, in place; returns `diffusion`.

        diffusion = Model.create_model(opt)                      # their code, as before
        sr3fast.compat.janspiry.accelerate(diffusion)            # their own step, every step
        sr3fast.compat.janspiry.accelerate(diffusion, steps=25)  # the few-step solver

    diffusion: the GaussianDiffusion, or the wrapper whose netG it is, in DataParallel or not.
    solver, steps: by default their step ("ddpm": y_0_hat clipped, the posterior's mean and variance) on every
        step of the schedule that is set when sampling; with steps= the few-step default of `Sampler`.
    rng: "noise_v1", the same noise on every device, or "torch", the draws of their code in its order, to
        compare outputs (torch.manual_seed before each).
    seed: of noise_v1: image i of a batch has seed + i. None draws one a call from torch's global generator.
    strict: their return value, the last image of a batch. False: every image, [B, C, H, W] (and [C, H, W], as
        theirs, for a batch of one). continous=True returns the same stack either way: x_in (unconditional:
        the initial noise), then the snapshots, along the batch.
    progress: show a progress bar.
    options: other arguments of `Sampler`: grid, eta, variance, clip, corrector_steps, dtype, graph.

    Follows what happens to the object later: set_new_noise_schedule, load_state_dict, training, .to(device).
    Dropout is off in sampling. A denoise_fn that is not one of their networks is called as it is (with a
    warning), in the fused loop; pass level= ("sqrt_gamma", "gamma" or "t") where its noise embedding is not
    theirs.
    `del diffusion.super_resolution, diffusion.sample` undoes it.

    Raises TypeError: not such an object; ValueError: options that do not fit.
    """
    inner = _gaussian_diffusion(diffusion)
    if rng not in ("noise_v1", "torch"):
        raise ValueError(f'rng must be "noise_v1" or "torch": got {rng!r}')
    if solver is None and steps is None and options.get("grid") is None:
        solver = "ddpm"
    accelerated = _Accelerated(inner, {"solver": solver, "steps": steps, **options}, rng, seed, strict, progress)
    if isinstance(getattr(inner, "betas", None), Tensor):
        accelerated.prepare()  # so that a wrong option is refused here
    inner.super_resolution = accelerated.super_resolution
    inner.sample = accelerated.sample
    return diffusion


def _gaussian_diffusion(diffusion: Any) -> Any:
    inner = getattr(diffusion, "netG", diffusion)
    if not hasattr(inner, "denoise_fn"):
        inner = getattr(inner, "module", inner)  # DataParallel
    lacks = [
        name
        for name in ("denoise_fn", "super_resolution", "sample", "set_new_noise_schedule")
        if not hasattr(inner, name)
    ]
    if lacks:
        raise TypeError(
            f"accelerate takes the GaussianDiffusion of {REPOSITORY}, or the wrapper whose netG it is: "
            f"{type(inner).__name__} has no {', '.join(lacks)}"
        )
    return inner


class _Accelerated:
    """super_resolution and sample for one of their objects, whose state is read anew in each call."""

    def __init__(
        self,
        diffusion: Any,
        options: dict[str, Any],
        rng: str,
        seed: int | None,
        strict: bool,
        progress: bool,
    ) -> None:
        self.diffusion = diffusion
        self.options = options
        self.rng = rng
        self.seed = seed
        self.strict = strict
        self.progress = progress
        self.network: _Network | None = None
        self.sampler: Sampler | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the object (an EMA, say) makes its own: captured graphs cannot be copied
        return {**self.__dict__, "network": None, "sampler": None}

    def super_resolution(self, x_in: Tensor, continous: bool = False) -> Tensor:
        network, sampler = self.prepare()
        if not network.conditional:
            raise ValueError("this network is unconditional: call sample(batch_size)")
        shape = (x_in.shape[0], network.out_channels or x_in.shape[1], *x_in.shape[2:])
        return self._run(network, sampler, x_in, shape, continous)

    def sample(self, batch_size: int = 1, continous: bool = False) -> Tensor:
        network, sampler = self.prepare()
        if network.conditional:
            raise ValueError("this network is conditional: call super_resolution(x_in)")
        side = self.diffusion.image_size
        shape = (batch_size, self.diffusion.channels, side, side)
        if network.variant == "ddpm":
            return self._run(network, sampler, None, shape, False, every=True)
        return self._run(network, sampler, None, shape, continous)

    def prepare(self) -> tuple[_Network, Sampler]:
        """The network and the sampler as the object now is, made anew only where it changed."""
        betas = getattr(self.diffusion, "betas", None)
        if not isinstance(betas, Tensor):
            raise ValueError("it has no noise schedule yet: call set_new_noise_schedule first")
        betas = betas.detach().cpu().double()
        if self.network is None or not self.network.holds(self.diffusion):
            self.network = _Network(self.diffusion, self.options.get("level"))
            self.sampler = None
        if self.sampler is None or not torch.equal(self.sampler.schedule.betas, betas):
            schedule = Schedule.from_betas(betas)
            options = {**self.options, "level": self.network.level}
            self.sampler = Sampler(self.network.f_theta, schedule, **options)
        return self.network, self.sampler

    @torch.no_grad()
    def _run(
        self,
        network: _Network,
        sampler: Sampler,
        x: Tensor | None,
        shape: tuple[int, ...],
        continous: bool,
        every: bool = False,
    ) -> Tensor:
        device = next(network.f_theta.parameters()).device

        def draw(step: int) -> Tensor:
            return torch.randn(shape, device=device)

        run: dict[str, Any] = {"progress": self.progress}
        if self.rng == "torch":
            seed, y_T = 0, draw(len(sampler.table))
            run["z"] = draw
        else:
            seed = int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed
            y_T = ops.noise(shape, seed, domain=noise.Y_T, device=device)
        run["y_T"] = y_T
        if continous:
            N = len(sampler.table)
            shots = [y for step, y in sampler.iterate(x, seed, **run) if step % (1 | (N // 10)) == 0]
            result = torch.cat([y_T if x is None else x, *shots])
        else:
            result = cast(Tensor, sampler(x, seed, **run))
        if self.rng == "torch" and network.variant == "ddpm":
            draw(0)  # it draws, and masks, at its last step too
        if continous or every:
            return result
        return result[-1] if self.strict or len(result) == 1 else result


class _Network:
    """Their denoise_fn as an f_theta: our UNet on their very parameters, or, where it is another, itself."""

    def __init__(self, diffusion: Any, level: str | None) -> None:
        self.denoise_fn = diffusion.denoise_fn
        network = getattr(self.denoise_fn, "module", self.denoise_fn)
        try:
            self.variant: str | None = _variant(dict(network.named_parameters()))
        except ValueError:
            self.variant = None
        self.f_theta: UNet | _Theirs
        self.out_channels: int | None
        try:
            self.f_theta = _tied(network)
            self.parameters = dict(network.named_parameters())
        except ValueError as error:
            warnings.warn(
                f"denoise_fn is called as it is, since it is no network of {REPOSITORY}: {error}",
                stacklevel=4,
            )
            self.f_theta = _Theirs(self.denoise_fn)
            self.parameters = {}
            self.out_channels = None
            self.conditional = bool(getattr(diffusion, "conditional", True))
        else:
            self.out_channels = self.f_theta.out_channels
            self.conditional = self.f_theta.in_channels > self.out_channels
        self.level = level or {"sr3": "sqrt_gamma", "ddpm": "t"}.get(self.variant or "")
        if self.level is None:
            raise ValueError(
                'level must say what denoise_fn is conditioned on, "sqrt_gamma", "gamma" or "t": it has '
                f"no noise embedding of {REPOSITORY}"
            )

    def holds(self, diffusion: Any) -> bool:
        """Whether this is still their network, parameter by parameter."""
        if diffusion.denoise_fn is not self.denoise_fn:
            return False
        if isinstance(self.f_theta, _Theirs):
            return True
        network = getattr(self.denoise_fn, "module", self.denoise_fn)
        now = dict(network.named_parameters())
        return now.keys() == self.parameters.keys() and all(now[n] is p for n, p in self.parameters.items())


class _Theirs(nn.Module):
    """f_theta(x, y_t, level) in their convention: denoise_fn(cat([x, y_t], 1), level)."""

    def __init__(self, denoise_fn: nn.Module) -> None:
        super().__init__()
        self.denoise_fn = denoise_fn

    def forward(self, x: Tensor | None, y_t: Tensor, level: Tensor) -> Tensor:
        return self.denoise_fn(y_t if x is None else torch.cat([x, y_t], 1), level)


def _tied(network: nn.Module) -> UNet:
    """Our UNet whose parameters are theirs (shared, not copied), checked to be the same function."""
    theirs = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    variant, ours = _variant(theirs), _renamed(theirs)
    structure = Structure.of_tensors(ours)
    norms = {(m.num_groups, m.eps) for m in network.modules() if isinstance(m, nn.GroupNorm)}
    if len(norms) != 1 or next(iter(norms))[1] != 1e-5:
        raise ValueError(f"its norms must agree on groups, with eps 1e-5: got (groups, eps) {sorted(norms)}")
    groups = next(iter(norms))[0]
    config = _resolve(structure, variant, {"groups": groups}, Path("denoise_fn"))
    unet = matched(config, ours, "denoise_fn").eval()
    for name, parameter in ours.items():
        module, _, leaf = name.rpartition(".")
        unet.get_submodule(module)._parameters[leaf] = parameter  # type: ignore[assignment]
    _check_same(unet, network)
    return unet


@torch.no_grad()
def _check_same(unet: UNet, network: nn.Module) -> None:
    """ValueError where two networks of the same tensors are different functions (an edited forward, say)."""
    parameter = next(unet.parameters())
    generator = torch.Generator().manual_seed(0)
    side = 2 * unet.multiple
    inputs = torch.randn(2, unet.in_channels, side, side, generator=generator)
    level = torch.tensor([[0.4], [0.9]]) if unet.variant == "sr3" else torch.tensor([700, 20])
    inputs, level = inputs.to(parameter.device, parameter.dtype), level.to(parameter.device)
    x, y_t = inputs.split([unet.in_channels - unet.out_channels, unet.out_channels], 1)
    with evaluation_mode(network), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        try:
            theirs = network(inputs, level).float()
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"its forward takes other arguments: {error}") from error
        ours = unet(x if x.shape[1] else None, y_t, level).float()
    tolerance = 1e-3 if parameter.dtype == torch.float32 else 5e-2
    difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= tolerance * size:
        raise ValueError(f"its forward is another function (up to {difference:.2g} apart, of {size:.2g})")
