"""Pictures that are not trained on."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import image, metrics
from ..data import Pictures
from ..sampler import Sampler
from ..weights import Model


def validate(model: Model, pictures: Pictures, steps: int = 10, count: int = 4) -> tuple[dict[str, float], list]:
    """Mean PSNR, SSIM and consistency (times 1e5) of the first `count` pictures by a few-step solver, and the rows
    (x, ours, truth), each [C, H, W]. Of a picture, at most 128 pixels a side.
    """
    device = next(model.unet.parameters()).device
    sampler = Sampler(model.unet, model.schedule, steps=steps, level=model.level, target=model.target)
    scores, rows = [], []
    for index in range(min(count, len(pictures))):
        _, x, truth = pictures.uncropped(index)
        most = max(128, math.ceil(pictures.scale))
        (height, width), small = image.divisible([min(n, most) for n in truth.shape[-2:]], pictures.scale)
        x, truth = x[:, :height, :width], truth[:, :height, :width]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "x looks like")  # a bright picture has no negative values
            y = sampler(image.reflect_pad(x, model.unet.multiple)[None].to(device), seed=index)
        assert isinstance(y, Tensor)
        y = y[..., :height, :width].cpu()
        source = image.resize(truth[None], small)
        row = {"psnr": metrics.psnr(y, truth[None]), "consistency": metrics.consistency(y, source) * 1e5}
        if min(height, width) >= metrics.SSIM_SIDE:
            row["ssim"] = metrics.ssim(y, truth[None])
        scores.append({name: value.item() for name, value in row.items()})
        rows.append((x, y[0], truth))
    known = {name: [s[name] for s in scores if name in s] for s in scores for name in s}
    return {name: sum(values) / len(values) for name, values in known.items()}, rows


def contact_sheet(rows: list, path: Path) -> None:
    """A PNG of the rows (x, ours, truth), one under the other; nothing where a picture has neither 1 nor 3
    channels.
    """
    if rows[0][0].shape[0] not in (1, 3):
        return
    width = max(x.shape[-1] for x, _, _ in rows)
    strips = [torch.cat([nn.functional.pad(p, (0, width - p.shape[-1]), value=1.0) for p in row], -1) for row in rows]
    image.write(image.to_picture(torch.cat(strips, -2)), path)
