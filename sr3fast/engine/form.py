"""What the engine rearranges, one switch each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from . import winograd
from .convolution import packs


@dataclass(frozen=True)
class Form:
    """The transformations, each of them exact up to rounding; Form() has them all.

    channels_last     [B, H, W, C] in memory: what the convolutions compute in
    fused_norms       GroupNorm + SiLU in one op, statistics in float32 (ops.group_norm_silu)
    late_bias         biases and noise shifts are added by the next norm, not in passes of their own
    noise_table       the noise embeddings and their projections are computed once for all levels
    no_cat            norms read a pair of tensors, a 1x1 convolution of a cat is two
    fused_residual    the residual sum is part of a convolution (CPU, 1x1) or of the next norm (CUDA)
    prepacked         CPU: weights in the blocked layout that oneDNN wants for this shape
    upsample          nearest neighbour + 3x3 as one transposed 4x4 of stride 2: 4/9 of the products
    winograd          CPU, float32: 3x3 convolutions by minimal filtering, a quarter of the products
    padded_channels   CUDA: input and output channels are a multiple of 8, for the tensor cores
    tuned             CUDA: by Triton, a bias and a residual in one pass, attention of few positions (half precision)
                      and, in a captured step, convolutions of few positions where that is faster (bfloat16); where
                      torch is asked to be deterministic when a step is captured, nothing is chosen by its time
    """

    channels_last: bool = True
    fused_norms: bool = True
    late_bias: bool = True
    noise_table: bool = True
    no_cat: bool = True
    fused_residual: bool = True
    prepacked: bool = True
    upsample: bool = True
    winograd: bool = True
    padded_channels: bool = True
    tuned: bool = True

    @classmethod
    def none(cls) -> Form:
        """The plain network."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})

    def on(self, device: torch.device, dtype: torch.dtype) -> Form:
        """What of it applies there."""
        on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
        prepacked = self.prepacked and self.channels_last and on_cpu and packs(dtype)
        in_winograd = self.winograd and self.channels_last and on_cpu and dtype == torch.float32
        return dataclasses.replace(
            self,
            # one pass fewer only where the norm is fused; pairs are read by the fused norm
            late_bias=self.late_bias and self.fused_norms,
            no_cat=self.no_cat and self.fused_norms,
            upsample=self.upsample and (prepacked or on_cuda),  # plain on a CPU it is slower
            prepacked=prepacked,
            winograd=in_winograd and winograd.kernels() is not None,
            padded_channels=self.padded_channels and on_cuda,
            tuned=self.tuned and self.channels_last and on_cuda,
        )
