"""Their object, sampling with our loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import noise, ops
from ...sampler import Sampler
from ...schedule import Schedule
from ...unet import UNet, evaluation_mode
from ...weights import Structure, matched
from .configs import resolve
from .names import REPOSITORY, renamed, variant_of


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
            self.variant: str | None = variant_of(dict(network.named_parameters()))
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
    variant, ours = variant_of(theirs), renamed(theirs)
    structure = Structure.of_tensors(ours)
    norms = {(m.num_groups, m.eps) for m in network.modules() if isinstance(m, nn.GroupNorm)}
    if len(norms) != 1 or next(iter(norms))[1] != 1e-5:
        raise ValueError(f"its norms must agree on groups, with eps 1e-5: got (groups, eps) {sorted(norms)}")
    groups = next(iter(norms))[0]
    config = resolve(structure, variant, {"groups": groups}, Path("denoise_fn"))
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
