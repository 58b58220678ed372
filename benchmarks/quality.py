"""Steps against quality: what each solver, grid and number of steps is worth to a model's pictures.

    python benchmarks/quality.py held-out --samples 8       whole pictures, the model's own defaults
    python benchmarks/quality.py steps --crop 64            every solver and grid, a crop of each picture

Pictures: astronaut, chelsea and coffee of scikit-image, on which photo-x4 was never trained. Writes JSON to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import skimage.data
import torch
from environment import environment
from PIL import Image
from torch import Tensor

from sr3fast import image, metrics, weights
from sr3fast.sampler import Sampler

PICTURES = ("chelsea", "coffee", "astronaut")
CENTRES = {"astronaut": (112, 224), "chelsea": (120, 220), "coffee": (200, 300)}  # of the crops: row, column
RESULTS = Path(__file__).parent / "results"

# (solver, grid) of the few-step rows; unipc2 and dpm++2m are deterministic given y_T, the others draw noise
FEW = [
    (solver, grid)
    for solver in ("sr3", "ddpm", "ddim", "dpm++2m", "sde-dpm++2m", "unipc2")
    for grid in ("t", "logsnr", "blend")
]


def truth(name: str, scale: int, crop: int | None) -> Image.Image:
    """A picture, or the crop of it, cut to sides that are whole at 1/scale and even at the network's
    levels.
    """
    picture = Image.fromarray(getattr(skimage.data, name)())
    if crop is not None:
        row, column = CENTRES[name]
        top, left = row - crop // 2, column - crop // 2
        return picture.crop((left, top, left + crop, top + crop))
    width, height = (side // (8 * scale) * 8 * scale for side in picture.size)
    return picture.crop((0, 0, width, height))


class Case:
    """A truth, its source, and what is measured of a reconstruction [B, C, H, W]."""

    def __init__(self, name: str, scale: int, crop: int | None) -> None:
        picture = truth(name, scale, crop)
        small = image.bicubic(picture, (picture.width // scale, picture.height // scale))
        self.truth, self.source = image.to_tensor(picture)[None], image.to_tensor(small)[None]
        self.x = image.to_tensor(image.bicubic(small, picture.size))[None]
        self.lanczos = image.to_tensor(small.resize(picture.size, Image.Resampling.LANCZOS))[None]

    def consistent(self, y: Tensor) -> Tensor:
        """y + up(source - down(y)), as the sampler's consistency=True."""
        small, size = (t.shape[-2:] for t in (self.source, self.truth))
        return y + image.resize(self.source - image.resize(y, (small[0], small[1])), (size[0], size[1]))

    def measure(self, y: Tensor) -> dict[str, float]:
        """Means over the batch: dB, SSIM, consistency (MSE on [0, 1]), dB from the truth's power spectrum."""
        like = self.truth.expand_as(y)
        values = {
            "psnr": metrics.psnr(y, like),
            "ssim": metrics.ssim(y, like),
            "consistency": metrics.consistency(y, self.source.expand(len(y), -1, -1, -1)),
            "spectrum": metrics.spectral_distance(y, like),
        }
        digits = {"consistency": 7}
        return {name: round(v.mean().item(), digits.get(name, 4)) for name, v in values.items()}


def draw(sampler: Sampler, x: Tensor, count: int, batch: int) -> Tensor:
    """`count` samples of one source, seeds 0.., `batch` at a time."""
    parts = []
    for first in range(0, count, batch):
        n = min(batch, count - first)
        y = sampler(x.expand(n, -1, -1, -1).contiguous(), seed=first)
        assert isinstance(y, Tensor)
        parts.append(y)
    return torch.cat(parts)


def sampler_of(model: weights.Model, dtype: torch.dtype | None, **options: object) -> Sampler:
    return Sampler(
        model.unet,
        model.schedule,
        level=model.level,
        target=model.target,
        scale=model.scale,
        dtype=dtype,
        **options,  # type: ignore[arg-type]
    )


def held_out(model: weights.Model, args: argparse.Namespace, dtype: torch.dtype | None) -> dict[str, object]:
    """Single samples and the mean of them, with and without consistency, against bicubic and Lanczos."""
    options = {name: model.card[name] for name in ("solver", "grid", "steps") if name in model.card}
    options |= {"steps": args.steps} if args.steps else {}
    sampler = sampler_of(model, dtype, **options)
    results: list[dict[str, object]] = []
    for name in PICTURES:
        case = Case(name, int(model.scale or 4), args.crop)
        began = time.perf_counter()
        y = draw(sampler, case.x, args.samples, args.batch)
        seconds = (time.perf_counter() - began) / args.samples
        mean = y.mean(0, keepdim=True)
        reconstructions = {
            "bicubic": case.x,
            "Lanczos": case.lanczos,
            "bicubic, consistent": case.consistent(case.x),
            "one sample": y,
            "one sample, consistent": case.consistent(y),
            f"mean of {args.samples}": mean,
            f"mean of {args.samples}, consistent": case.consistent(mean),
        }
        size = list(case.truth.shape[-2:])
        for what, reconstruction in reconstructions.items():
            record = {"picture": name, "size": size, "reconstruction": what, **case.measure(reconstruction)}
            results.append(record | ({"seconds": round(seconds, 2)} if what == "one sample" else {}))
            print(json.dumps(results[-1]), flush=True)
        write(args, {"samples": args.samples, "sampler": options, "results": results})
    return {"samples": args.samples, "sampler": options, "results": results}


def steps(model: weights.Model, args: argparse.Namespace, dtype: torch.dtype | None) -> dict[str, object]:
    """Every solver and grid at few steps, and the full chain; a crop of each picture, the mean over them."""
    runs: list[tuple[str, str | None, int | None]] = [(solver, grid, n) for n in args.numbers for solver, grid in FEW]
    if args.full:
        runs = [("ddpm", None, None), ("sr3", None, None), *runs]
    cases = [Case(name, int(model.scale or 4), args.crop) for name in PICTURES]
    x = torch.cat([case.x for case in cases])
    rows: list[dict[str, object]] = []
    rows.append({"solver": "bicubic", "steps": 0, **average([case.measure(case.x) for case in cases])})
    for solver, grid, n in runs:
        sampler = sampler_of(model, dtype, solver=solver, grid=grid, steps=n)
        began = time.perf_counter()
        y = [sampler(x, seed=100 * i) for i in range(args.samples)]
        seconds = (time.perf_counter() - began) / args.samples / len(cases)
        singles = [case.measure(torch.stack([s[j] for s in y])) for j, case in enumerate(cases)]  # type: ignore[index]
        passes = len(sampler.table.rows)
        row = {"solver": solver, "grid": grid or "every step", "steps": passes, **average(singles)}
        rows.append({**row, "seconds": round(seconds, 3)})
        print(json.dumps(rows[-1]), flush=True)
        write(args, {"crop": args.crop, "samples": args.samples, "results": [*kept(args, rows), *rows]})
    return {"crop": args.crop, "samples": args.samples, "results": rows}


def kept(args: argparse.Namespace, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of an earlier run of the same kind that this one has not measured again."""
    if not args.out.exists():
        return []
    record = json.loads(args.out.read_text())
    if any(record.get(name) != getattr(args, name) for name in ("model", "dtype", "crop", "samples")):
        return []
    new = {(row["solver"], row.get("grid"), row["steps"]) for row in rows}
    return [row for row in record["results"] if (row["solver"], row.get("grid"), row["steps"]) not in new]


def average(scores: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(score[name] for score in scores) / len(scores), 7) for name in scores[0]}


def write(args: argparse.Namespace, results: dict[str, object]) -> None:
    """Rewritten after every row, so that a run that is stopped keeps what it measured."""
    record = {"model": args.model, "dtype": args.dtype, **results, "environment": environment()}
    with image.atomic(args.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("held-out", "steps"))
    parser.add_argument("--model", default="photo-x4")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--crop", type=int, help="side of a crop; whole pictures without it (steps: 64)")
    parser.add_argument("--steps", type=int, help="held-out: in place of the model's own")
    parser.add_argument("--numbers", type=int, nargs="+", default=[6, 10, 15, 25, 50, 100])
    parser.add_argument("--out", type=Path, help="the JSON file, in place of that in benchmarks/results/")
    parser.add_argument("--full", action="store_true", help="steps: sr3 and ddpm on the whole schedule too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    args.out = args.out or RESULTS / f"quality-{args.command}.json"
    if args.command == "steps":
        args.crop = args.crop or 64
    model = weights.load(args.model)
    {"held-out": held_out, "steps": steps}[args.command](model, args, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
