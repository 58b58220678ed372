"""The network for one shape: its layers in order, its buffers, its noise embeddings as a table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..unet import Downsample, NoiseEmbedding, ResnetBlock, UNet, Upsample, sinusoid
from .blocks import Block, Builder, Part, held
from .form import Form


class Network:
    """The layers and buffers for one shape. Only one run uses it at a time."""

    def __init__(
        self,
        unet: UNet,
        form: Form,
        dtype: torch.dtype,
        device: torch.device,
        shape: Sequence[int],
        packed: dict[Any, Any],
    ):
        B, Cy, H, W = shape
        self.unet, self.form, self.device, self.shape = unet, form, device, tuple(shape)
        Cx = unet.in_channels - Cy
        self.input = torch.zeros((B, self.padded(unet.in_channels), H, W), dtype=dtype, device=device).contiguous(
            memory_format=torch.channels_last if form.channels_last else torch.contiguous_format
        )
        self.x = self.input[:, :Cx] if Cx else None
        self.into = self.input[:, Cx : Cx + Cy]
        blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock)]
        build = Builder(form, dtype, device, shape, sum(b.noise.out_features for b in blocks), packed)
        self.build(unet, build)
        self.blocks, self.shifts = build.blocks, build.shifts
        # shifts = row[spread]: a block's row once for each sample; of one sample, the row
        column, spread = 0, []
        for block in self.blocks:
            C = block.noise.out_features
            spread.append(torch.arange(column, column + C).repeat(B))
            column += C
        self.spread = torch.cat(spread).to(device) if B > 1 else None
        self.noise = Noise(unet, self.blocks, form.late_bias)
        self.version: Any = None  # of the weights it was made from
        self.stream: Any = None  # the CUDA stream that used it last
        self.graph: Any = None  # the captured step

    def padded(self, channels: int) -> int:
        return -(-channels // 8) * 8 if self.form.padded_channels else channels

    def build(self, unet: UNet, build: Builder) -> None:
        late_bias = self.form.late_bias
        conv, extra = unet.conv_in, self.padded(unet.in_channels) - unet.in_channels
        bias = None if late_bias else conv.bias
        self.conv_in = build.conv_of(id(conv), F.pad(conv.weight, (0, 0, 0, 0, 0, extra)), bias)
        part = build.part(conv)
        pushed = [part]
        downs: list[Any] = list(unet.downs)
        mid: list[Any] = list(unet.mid)
        ups: list[Any] = list(unet.ups)
        self.downs: list[Any] = []
        for k, layer in enumerate(downs):
            if isinstance(layer, ResnetBlock):
                follower = downs[k + 1] if k + 1 < len(downs) else None
                down = isinstance(follower, Downsample)
                made: Any = Block(build, layer, [part], lazy=not down, exact=down)
                part = made.out
            else:
                made, part = build.down(layer)
            self.downs.append(made)
            # what is read again is the sum, with its bias
            pushed.append(Part(part.channels, None if part.late else part.bias))
        self.mid: list[Any] = []
        for k, layer in enumerate(mid):
            self.mid.append(Block(build, layer, [part], lazy=k == 0, exact=False))
            part = self.mid[-1].out
        self.ups: list[Any] = []
        for k, layer in enumerate(ups):
            if isinstance(layer, ResnetBlock):
                last, up = k + 1 == len(ups), k + 1 < len(ups) and isinstance(ups[k + 1], Upsample)
                made = Block(build, layer, [part, pushed.pop()], lazy=last, exact=up)
                part = made.out
            else:
                made, part = build.up(layer)
            self.ups.append(made)
        self.norm_out = build.norm(unet.norm_out, part.bias)
        conv, extra = unet.conv_out, self.padded(unet.out_channels) - unet.out_channels
        weight, bias = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, extra)), F.pad(conv.bias, (0, extra))  # type: ignore[arg-type]
        self.conv_out = build.conv_of(id(conv), weight, bias)

    def forward(self) -> Tensor:
        """eps_hat of what lies in the input, at the noise level that lies in the shifts."""
        h = self.conv_in(self.input)
        pushed = []
        for layer in self.downs:
            if isinstance(layer, Block):
                h, read = layer(h)
                pushed.append(read)
            else:
                pushed.append(h)
                h = layer(h)
        for k, layer in enumerate(self.mid):
            h, read = layer(h)
            if k == 0:
                pushed.append(read)
        for layer in self.ups:
            h = layer((h, pushed.pop()))[0] if isinstance(layer, Block) else layer(h)
        out = self.conv_out(self.norm_out(h)[0])
        return out[:, : self.into.shape[1]]

    def set(self, row: Tensor) -> None:
        """Lay a row of the noise table, [1, K], into the shifts."""
        if self.spread is None:
            self.shifts.copy_(row.view(-1))
        else:
            torch.index_select(row.view(-1), 0, self.spread, out=self.shifts)


class Noise:
    """levels [N] -> float32 [N, K]: every block's noise shift (and conv1's bias), one beside the other."""

    def __init__(self, unet: UNet, blocks: list[ResnetBlock], with_bias: bool):
        embedding: NoiseEmbedding = unet.embedding
        self.linear1, self.linear2 = (
            (held(layer.weight), held(layer.bias)) for layer in (embedding.linear1, embedding.linear2)
        )
        self.silu = unet.variant == "ddpm"
        self.weight = torch.cat([b.noise.weight.detach().float() for b in blocks])
        bias = [b.noise.bias.detach().float() for b in blocks]
        if with_bias:
            bias = [n + b.conv1.bias.detach().float() for n, b in zip(bias, blocks, strict=True)]  # type: ignore[union-attr]
        self.bias = torch.cat(bias)

    def __call__(self, levels: Tensor) -> Tensor:
        e = sinusoid(levels, self.linear1[0].shape[1])
        e = F.linear(F.silu(F.linear(e, *self.linear1)), *self.linear2)
        return F.linear(F.silu(e) if self.silu else e, self.weight, self.bias)


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """The engine has its own dtypes: autocast outside must not change them."""
    with torch.autocast(device.type, enabled=False):
        yield
