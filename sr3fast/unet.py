"""The network f_theta of SR3 (Saharia et al. 2021, section 2.4 and appendix A), in plain PyTorch on our ops.

    eps_hat = f_theta(x, y_t, level)

It is the U-Net that Janspiry's SR3 code trains, so the weights people have fit it. engine/ holds the
inference form of the same function.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

VARIANTS = ("sr3", "ddpm")

Pair = tuple[Tensor, Tensor]


def sinusoid(level: Tensor, channels: int) -> Tensor:
    """[sin(level f_i), cos(level f_i)], f_i = 10000^(-i/n), i = 0..n-1, n = channels/2.

    level: [B] or [B, 1], any dtype; returns float32 [B, channels]. No scale factor: sqrt(gamma) enters as
    it is.
    """
    n = channels // 2
    i = torch.arange(n, dtype=torch.float32, device=level.device)
    f = torch.exp(i * (-math.log(1e4) / n))
    angle = level.reshape(-1, 1).float() * f
    return torch.cat([angle.sin(), angle.cos()], 1)


class NoiseEmbedding(nn.Module):
    """level -> embedding [B, channels]: sinusoid, Linear(C, 4C), SiLU, Linear(4C, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)

    def forward(self, level: Tensor) -> Tensor:
        e = sinusoid(level, self.linear1.in_features).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(e)))


class ResnetBlock(nn.Module):
    """skip(h) + conv2(dropout(act(norm2(conv1(act(norm1(h))) + noise(e))))), then the attention if any.

    h: [B, in_channels, H, W], or a pair of tensors that is read as its concatenation; e: [B, channels of the
    embedding], already through SiLU in the ddpm variant. Returns [B, out_channels, H, W].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        groups: int,
        dropout: float,
        attention: bool,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.noise = nn.Linear(embedding, out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = Attention(out_channels, groups) if attention else None

    def forward(self, h: Tensor | Pair, e: Tensor) -> Tensor:
        r = self.conv1(normalize(self.norm1, h))
        r = self.conv2(self.dropout(normalize(self.norm2, r, shift=self.noise(e))))
        r = r + self.residual(h)
        return r if self.attention is None else self.attention(r)

    def residual(self, h: Tensor | Pair) -> Tensor:
        if isinstance(h, Tensor):
            return h if self.skip is None else self.skip(h)
        # a 1x1 convolution of a concatenation is the sum of two: nothing is concatenated
        assert self.skip is not None, "a block that reads a pair changes the number of channels"
        first, second = self.skip.weight.split([h[0].shape[1], h[1].shape[1]], 1)
        return F.conv2d(h[0], first, self.skip.bias) + F.conv2d(h[1], second)


class Attention(nn.Module):
    """h + out(softmax(q k^T / sqrt(C)) v) over the H W positions; q, k, v: thirds of qkv(norm(h))."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        _, C, H, W = h.shape
        qkv = self.qkv(normalize(self.norm, h, silu=False))
        q, k, v = qkv.permute(0, 2, 3, 1).reshape(-1, 1, H * W, 3 * C).chunk(3, -1)  # [B, 1, H W, C]
        a = F.scaled_dot_product_attention(q, k, v)  # its default scale is 1/sqrt(C)
        return h + self.out(a.reshape(-1, H, W, C).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """3x3 convolution of stride 2: [B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


class Upsample(nn.Module):
    """Nearest neighbour times two, then a 3x3 convolution: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """f_theta(x, y_t, level) -> eps_hat.

    channels       width C of the first level and of the noise embedding (even)
    multipliers    a level's width is channels * multiplier; levels = len(multipliers)
    blocks         ResnetBlocks a level on the way down (one more on the way up)
    attention      the resolutions that have attention: level i where image_size / 2^i is among them
    groups         groups of every GroupNorm; must divide every width
    dropout        in each block before its second convolution, in training only
    image_size     side of the training images; it only places the attention, inputs may have any size
    in_channels    channels of x plus channels of y_t (equal to out_channels: unconditional)
    out_channels   channels of y_t and of eps_hat
    variant        "sr3": level is sqrt(gamma) (or gamma, as it was trained), float [B, 1]
                   "ddpm": level is the index 0..T-1 into betas (the paper's t, less one), int64 [B]

    The defaults are the network of Janspiry's sr_sr3_16_128, 97.8 M parameters.
    Source: arXiv:2104.07636, as in Janspiry/Image-Super-Resolution-via-Iterative-Refinement.
    """

    def __init__(
        self,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8, 8),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        groups: int = 32,
        dropout: float = 0.2,
        image_size: int = 128,
        in_channels: int = 6,
        out_channels: int = 3,
        variant: str = "sr3",
    ) -> None:
        super().__init__()
        self._config: dict[str, Any] = {
            "channels": channels,
            "multipliers": tuple(multipliers),
            "blocks": blocks,
            "attention": tuple(attention),
            "groups": groups,
            "dropout": dropout,
            "image_size": image_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "variant": variant,
        }
        check_config(self._config)
        self.variant = variant
        self.in_channels, self.out_channels = in_channels, out_channels
        self.multiple = 2 ** (len(multipliers) - 1)

        def block(ins: int, outs: int, with_attention: bool) -> ResnetBlock:
            return ResnetBlock(ins, outs, channels, groups, dropout, with_attention)

        widths = [channels * m for m in multipliers]
        attends = [image_size // 2**i in attention for i in range(len(widths))]

        self.embedding = NoiseEmbedding(channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        self.downs = nn.ModuleList()
        c, pushed = channels, [channels]  # pushed: widths of the outputs that the way up reads again
        for i, width in enumerate(widths):
            for _ in range(blocks):
                self.downs.append(block(c, width, attends[i]))
                c = width
                pushed.append(c)
            if i < len(widths) - 1:
                self.downs.append(Downsample(c))
                pushed.append(c)

        self.mid = nn.ModuleList([block(c, c, True), block(c, c, False)])

        self.ups = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.ups.append(block(c + pushed.pop(), width, attends[i]))
                c = width
            if i > 0:
                self.ups.append(Upsample(c))

        self.norm_out = group_norm(groups, c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: UNet(**unet.config) has the same structure."""
        return dict(self._config)

    def forward(self, x: Tensor | None, y_t: Tensor, level: Tensor) -> Tensor:
        """eps_hat, [B, Cy, H, W] in the dtype of the weights (of autocast, where it is on).

        x:     [B, in_channels - out_channels, H, W], the source at the target's size; None for an
               unconditional network
        y_t:   [B, out_channels, H, W], sides a multiple of `self.multiple` = 2^(levels - 1)
        level: float [B, 1] (variant "sr3") or int64 [B] (variant "ddpm")
        """
        self.check_inputs(x, y_t, level)
        e = self.embedding(level)
        if self.variant == "ddpm":
            e = F.silu(e)  # each of its blocks applies it before the projection
        h = y_t if x is None else torch.cat([x, y_t], 1)
        h = self.conv_in(h.to(self.conv_in.weight.dtype))
        pushed = [h]
        for layer in self.downs:
            h = layer(h, e) if isinstance(layer, ResnetBlock) else layer(h)
            pushed.append(h)
        for layer in self.mid:
            h = layer(h, e)
        for layer in self.ups:
            h = layer((h, pushed.pop()), e) if isinstance(layer, ResnetBlock) else layer(h)
        return self.conv_out(normalize(self.norm_out, h))

    def check_inputs(self, x: Tensor | None, y_t: Tensor, level: Tensor) -> None:
        """ValueError where the shapes or dtypes are not those that forward names."""
        Cx, Cy = self.in_channels - self.out_channels, self.out_channels
        if y_t.dim() != 4 or y_t.shape[1] != Cy:
            raise ValueError(f"y_t must be [B, {Cy}, H, W] for this network: got {list(y_t.shape)}")
        B, _, H, W = y_t.shape
        if H % self.multiple or W % self.multiple or H == 0 or W == 0:
            raise ValueError(f"the sides must be multiples of 2^(levels - 1) = {self.multiple}: got H={H}, W={W}")
        if x is None and Cx:
            raise ValueError(f"x is missing: this network is conditional, it reads x of [B, {Cx}, H, W]")
        if x is not None and not Cx:
            raise ValueError(f"x must be None: this network is unconditional (in_channels = out_channels = {Cy})")
        if x is not None and tuple(x.shape) != (B, Cx, H, W):
            raise ValueError(f"x must be {[B, Cx, H, W]}, the size of y_t with {Cx} channels: got {list(x.shape)}")
        if self.variant == "sr3":
            if tuple(level.shape) != (B, 1) or not level.is_floating_point():
                raise ValueError(
                    f"level must be a floating-point tensor {[B, 1]} (variant 'sr3'): "
                    f"got {list(level.shape)} of {level.dtype}"
                )
        elif tuple(level.shape) != (B,) or level.dtype != torch.int64:
            raise ValueError(
                f"level must be an int64 tensor {[B]} (variant 'ddpm'): got {list(level.shape)} of {level.dtype}"
            )


def normalize(norm: nn.GroupNorm, h: Tensor | Pair, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """act(GroupNorm(h + shift)) by the fused op, with the parameters that `norm` holds."""
    return ops.group_norm_silu(h, norm.weight, norm.bias, norm.num_groups, norm.eps, shift=shift, silu=silu)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    if channels % groups:
        raise ValueError(f"groups must divide the channels: got {channels} channels and groups={groups}")
    return nn.GroupNorm(groups, channels)


def check_config(config: dict[str, Any]) -> None:
    """ValueError for arguments that no network can have."""
    if config["variant"] not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}: got {config['variant']!r}")
    for name in ("channels", "blocks", "groups", "image_size", "in_channels", "out_channels"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} must be a positive integer: got {config[name]!r}")
    multipliers = config["multipliers"]
    if not multipliers or any(not isinstance(m, int) or m < 1 for m in multipliers):
        raise ValueError(f"multipliers must be positive integers, one a level: got {multipliers}")
    if config["channels"] % 2:
        raise ValueError(f"channels must be even (sines and cosines of the level): got {config['channels']}")
    if config["in_channels"] < config["out_channels"]:
        raise ValueError(
            "in_channels = channels of x + out_channels, so it cannot be smaller than out_channels: "
            f"got {config['in_channels']} and {config['out_channels']}"
        )
    if config["image_size"] % 2 ** (len(multipliers) - 1):
        raise ValueError(
            f"image_size must be a multiple of 2^(levels - 1) = {2 ** (len(multipliers) - 1)}: "
            f"got {config['image_size']}"
        )
    if not 0.0 <= config["dropout"] < 1.0:
        raise ValueError(f"dropout must be in [0, 1): got {config['dropout']}")


_evaluated: dict[int, int] = {}  # id of a module -> how many are inside `evaluation_mode` with it
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def evaluation_mode(f_theta: Any) -> Iterator[None]:
    """No dropout inside, and every submodule's mode as it was outside, also where several overlap."""
    modules = list(f_theta.modules()) if isinstance(f_theta, nn.Module) else []
    with _evaluated_lock:
        ours = [m for m in modules if m.training or id(m) in _evaluated]
        for module in ours:
            _evaluated[id(module)] = _evaluated.get(id(module), 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            for module in ours:
                _evaluated[id(module)] -= 1
                if not _evaluated[id(module)]:
                    del _evaluated[id(module)]
                    module.training = True
