"""A photograph that the weights have never seen: four times smaller by bicubic, then larger again by SR3.

    python examples/demo.py                  # or: make demo

It writes the result and a picture of how it came about (source, refinements y_t, result, truth), and prints
how long that took and how near it came to the truth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from sr3fast import image, metrics
from sr3fast.upscaling import Trace, Upscaler, beside

PHOTOGRAPH = Path(__file__).parent / "chelsea.png"
DETAIL = (130, 90, 290, 250)
"""Left, top, right, bottom of what the picture shows, in pixels of the photograph."""
LABEL = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", type=Path, nargs="?", default=PHOTOGRAPH)
    parser.add_argument("--weights", default="photo-x4")
    parser.add_argument("--steps", type=int, help="by default the weights' own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures")
    options = parser.parse_args()

    upscaler = Upscaler(options.weights, steps=options.steps)
    scale = round(upscaler.scale)
    truth = image.read(options.photograph).convert("RGB")
    small = (truth.width // scale, truth.height // scale)
    truth = truth.crop((0, 0, scale * small[0], scale * small[1]))
    source = image.bicubic(truth, small)

    print(f"{source.width} x {source.height} -> {truth.width} x {truth.height} on {upscaler.device}")
    trace = Trace(frames=4, side=max(truth.size))
    began = time.perf_counter()
    result = upscaler(source, options.seed, trace=trace, progress=True)
    seconds = time.perf_counter() - began
    assert isinstance(result, Image.Image)

    image.write(source, options.out / "source.png")
    image.write(result, options.out / "result.png")
    image.write(picture(source, trace.pictures[:-1], result, truth), options.out / "picture.png")

    print(f"{len(upscaler.sampler.table)} steps in {seconds:.1f} s, {torch.get_num_threads()} CPU threads\n")
    # PSNR and SSIM reward the mean of all that could have been there, which is blurred; the spectrum does not
    print(f"{'':10s} {'PSNR':>9s} {'SSIM':>7s}   {'distance from the power spectrum of the truth'}")
    y_0 = image.to_tensor(truth)[None]
    for name, one in (("bicubic", image.bicubic(source, truth.size)), ("sr3fast", result)):
        y = image.to_tensor(one)[None]
        psnr, ssim = metrics.psnr(y, y_0).item(), metrics.ssim(y, y_0).item()
        print(f"{name:10s} {psnr:6.2f} dB {ssim:7.4f}   {spectral_distance(y, y_0)}")
    print(f"\nresult:  {options.out / 'result.png'}\npicture: {options.out / 'picture.png'}")


def spectral_distance(y: torch.Tensor, truth: torch.Tensor) -> str:
    if min(truth.shape[-2:]) < 64:
        return "(too small a picture)"
    return f"{metrics.spectral_distance(y, truth).item():.1f} dB"


def picture(
    source: Image.Image, refinements: list[Image.Image], result: Image.Image, truth: Image.Image
) -> Image.Image:
    """What README.md shows: a detail of the source, bicubic, y_t at a few steps, the result and the truth."""
    pixels = source.resize(truth.size, Image.Resampling.NEAREST)
    names = ["source", "bicubic", *["y_t"] * len(refinements), "sr3fast", "truth"]
    panels = [pixels, image.bicubic(source, truth.size), *refinements, result, truth]
    detail = DETAIL if truth.width >= DETAIL[2] and truth.height >= DETAIL[3] else (0, 0, *truth.size)
    return beside([labelled(panel.crop(detail), name) for name, panel in zip(names, panels, strict=True)])


def labelled(panel: Image.Image, name: str) -> Image.Image:
    out = Image.new("RGB", (panel.width, panel.height + LABEL), "white")
    out.paste(panel, (0, LABEL))
    ImageDraw.Draw(out).text((panel.width / 2, LABEL / 2), name, fill="black", anchor="mm")
    return out


if __name__ == "__main__":
    main()
