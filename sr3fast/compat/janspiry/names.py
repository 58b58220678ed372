"""Their names of parameters and ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

REPOSITORY = "Janspiry's SR3 code"

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


def our_name(theirs: str) -> str | None:
    """UNet's name of a parameter of their network, or None where it has none."""
    module, _, leaf = theirs.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{leaf}"
    match = re.fullmatch(r"(downs|mid|ups)\.(\d+)\.(.+)", module)
    if match is None or match[3] not in INNER_MODULES:
        return None
    i = int(match[2]) - (match[1] == "downs")  # their downs.0 is our conv_in
    return f"{match[1]}.{i}.{INNER_MODULES[match[3]]}.{leaf}"


def their_name(ours: str, variant: str) -> str:
    """The inverse of `our_name`."""
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


def variant_of(names: Mapping[str, Any]) -> str:
    for prefix, variant in (("noise_level_mlp.", "sr3"), ("time_mlp.", "ddpm")):
        if any(name.startswith(prefix) for name in names):
            return variant
    raise ValueError(f"it has neither noise_level_mlp nor time_mlp, the noise embeddings of {REPOSITORY}")


def renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their network's tensors under our names. ValueError: a tensor their networks do not have."""
    ours = {}
    for name, tensor in theirs.items():
        if name == FREQUENCIES:
            _check_frequencies(tensor)
            continue
        known = our_name(name)
        if known is None:
            raise ValueError(f"{name} {list(tensor.shape)} is no tensor of the networks of {REPOSITORY}")
        ours[known] = tensor
    return ours


def _check_frequencies(saved: Tensor) -> None:
    n = saved.numel()
    ours = torch.exp(torch.arange(n, dtype=torch.float64) * (-math.log(1e4) / n))
    if not torch.allclose(saved.detach().cpu().double(), ours, rtol=1e-5, atol=0):
        raise ValueError(f"{FREQUENCIES} must be 10000^(-i/n), i = 0..{n - 1}: these are other frequencies")
