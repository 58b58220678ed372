"""What a sampling step is timed against: the same network as people write it, and others' loops.

Each function below is a generator that does one step of a sampling run for each `next`, over and over.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sr3fast.engine import Engine
from sr3fast.sampler import Sampler
from sr3fast.schedule import Schedule
from sr3fast.unet import Attention, ResnetBlock, UNet

STEPS = 100  # of a run; a step costs the same in a run of any length
SCHEDULE = Schedule.named("linear", T=2000, start=1e-6, end=1e-2)


class Plain(nn.Module):
    """The network of a UNet with PyTorch's own layers only: group_norm, silu, cat, interpolate."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, y_t: Tensor, level: Tensor) -> Tensor:
        unet = self.unet
        e = unet.embedding(level)
        h = unet.conv_in(torch.cat([x, y_t], 1))
        pushed = [h]
        for layer in unet.downs:
            h = self.block(layer, h, e) if isinstance(layer, ResnetBlock) else layer(h)
            pushed.append(h)
        for layer in unet.mid:
            h = self.block(layer, h, e)
        for layer in unet.ups:
            if isinstance(layer, ResnetBlock):
                h = self.block(layer, torch.cat([h, pushed.pop()], 1), e)
            else:
                h = layer(h)
        return unet.conv_out(F.silu(norm(unet.norm_out, h)))

    def block(self, block: ResnetBlock, h: Tensor, e: Tensor) -> Tensor:
        r = block.conv1(F.silu(norm(block.norm1, h)))
        r = r + block.noise(e)[:, :, None, None]
        r = block.conv2(F.silu(norm(block.norm2, r)))
        r = r + (h if block.skip is None else block.skip(h))
        return r if block.attention is None else self.attend(block.attention, r)

    def attend(self, attention: Attention, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        q, k, v = attention.qkv(norm(attention.norm, h)).flatten(2).chunk(3, 1)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / C**0.5, -1)
        return h + attention.out(torch.einsum("bij,bcj->bci", weights, v).reshape(B, C, H, W))


def norm(layer: nn.GroupNorm, h: Tensor) -> Tensor:
    return F.group_norm(h, layer.num_groups, layer.weight, layer.bias, layer.eps)


@torch.no_grad()
def textbook(f_theta: Callable, x: Tensor) -> Iterator[Tensor]:
    """The loop of Janspiry's code: y_0_hat, clip, posterior mean, fresh noise, one line each."""
    table = Sampler(f_theta, SCHEDULE, solver="ddpm", steps=STEPS).table
    while True:
        y = torch.randn(len(x), 3, *x.shape[2:], device=x.device)
        for row, gamma in zip(table.rows.tolist(), table.gamma.tolist(), strict=True):
            recip, ratio, clip, A, _, C0, _, _, S = row
            level = torch.full((len(x), 1), gamma**0.5, device=x.device)
            eps_hat = f_theta(x, y, level)
            y_0_hat = (recip * y - ratio * eps_hat).clamp_(-clip, clip)
            y = A * y + C0 * y_0_hat
            y = y + S * torch.randn_like(y)
            yield eps_hat


def in_bfloat16(f_theta: nn.Module) -> Callable:
    """The best that is to be had without rewriting: weights and activations bfloat16, channels_last."""

    def call(x: Tensor, y_t: Tensor, level: Tensor) -> Tensor:
        x, y_t = (t.to(torch.bfloat16, memory_format=torch.channels_last) for t in (x, y_t))
        return f_theta(x, y_t, level).float()

    return call


@torch.no_grad()
def ours(f_theta: UNet | Engine, x: Tensor, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    sampler = Sampler(f_theta, SCHEDULE, solver="ddpm", steps=STEPS, dtype=dtype)
    while True:
        for _, y in sampler.iterate(x):
            yield y


@torch.no_grad()
def diffusers(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """UNet2DModel with the same widths, blocks and place of attention, and its own DDPM scheduler."""
    from diffusers import DDPMScheduler, UNet2DModel  # type: ignore[attr-defined]

    model = UNet2DModel(
        sample_size=128,
        in_channels=6,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(64, 128, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 3, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 3),
        norm_num_groups=32,
    )
    model = model.to(x.device, dtype, memory_format=torch.channels_last).eval()
    scheduler = DDPMScheduler(2000, beta_start=1e-6, beta_end=1e-2)
    scheduler.set_timesteps(STEPS)
    x = x.to(dtype)
    while True:
        y = torch.randn_like(x)
        for t in scheduler.timesteps:
            y = scheduler.step(model(torch.cat([x, y], 1), t).sample, t, y).prev_sample
            yield y


def plain_copy(unet: UNet) -> Plain:
    copy = Plain(UNet(**unet.config).to(next(unet.parameters()).device).eval())
    copy.unet.load_state_dict(unet.state_dict())
    return copy


def low_precision(unet: UNet) -> Plain:
    """A copy with bfloat16 weights, channels_last."""
    return plain_copy(unet).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def variants(unet: UNet, x: Tensor) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Name -> the runs to time, the baseline first."""
    plain, low = Plain(unet), low_precision(unet)
    found: dict[str, Callable[[], Iterator[Tensor]]] = {
        "eager float32": lambda: textbook(plain, x),
        "eager bfloat16, channels_last": lambda: textbook(in_bfloat16(low), x),
        "sr3fast float32": lambda: ours(unet, x, torch.float32),
        "sr3fast bfloat16": lambda: ours(unet, x, torch.bfloat16),
    }
    try:
        import diffusers as _  # noqa: F401
    except ImportError:
        return found
    found["diffusers float32"] = lambda: diffusers(x, torch.float32)
    found["diffusers bfloat16"] = lambda: diffusers(x, torch.bfloat16)
    return found


def interleaved(runs: dict[str, Iterator[Tensor]], rounds: int, steps: int = 1) -> dict[str, list[float]]:
    """Seconds a step, round by round; each round times `steps` steps of every run, so all see the same machine."""
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            next(run)
    for _ in range(rounds):
        for name, run in runs.items():
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(steps):
                next(run)
            if cuda:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / steps)
    return times


def peak_memory(f: Callable[[], object]) -> int | None:
    """Bytes that f() adds at its peak: of torch's on a GPU, of resident pages on Linux; None elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # pages that others freed would be used again, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that was resident, begins anew
    before = _resident("VmRSS")
    f()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    kilobytes = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    return int(kilobytes[1]) * 1024


@torch.no_grad()
def check_agreement(unet: UNet, x: Tensor) -> dict[str, float]:
    """Relative RMS errors against the plain float64 network; AssertionError where ours are not as exact as plain
    PyTorch's in our layout, in float32 and in bfloat16 autocast."""
    plain = plain_copy(unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact = plain_copy(unet).double()
    y = torch.randn(len(x), 3, *x.shape[2:], device=x.device, generator=torch.Generator(x.device).manual_seed(1))
    level = torch.full((1,), 0.6, device=x.device)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        inputs = (x, y, level.expand(len(x), 1))
        expected = exact(*(t.double() for t in inputs))
        errors = {"plain": _error(plain(*inputs), expected)}
        with torch.autocast(x.device.type, torch.bfloat16):
            errors["autocast"] = _error(plain(*inputs), expected)
        for dtype in (torch.float32, torch.bfloat16):
            run = Engine(unet, dtype).start_run(x, y.shape, level)
            run.into.copy_(y)
            errors[str(dtype).removeprefix("torch.")] = _error(run(0), expected)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    assert errors["float32"] < 2 * errors["plain"], errors
    assert errors["bfloat16"] < 1.5 * errors["autocast"], errors
    return errors


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def network(device: str) -> UNet:
    """Janspiry's 16 -> 128 network, 97.8 M parameters, random weights."""
    torch.manual_seed(0)
    return UNet().to(device).eval()
