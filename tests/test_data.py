"""Training data: layouts, crops that equal the whole picture's, order, and what is refused."""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sr3fast import data
from sr3fast.data import DataError, Order, Pictures, Skipped, open_items


def picture(folder, name, size=(48, 40), seed=0, mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(values)
    image.save(folder / name)
    return image


def as_tensor(image):
    values = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1)) / 255 * 2 - 1


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        picture(tmp_path / "photos", f"{i}.png", seed=i)
    return tmp_path / "photos"


def test_source_is_pillows_bicubic_of_the_whole_picture(tmp_path):
    whole = picture(tmp_path, "a.png", (51, 42))  # 42 = 10 * 4 + 2: what is not whole at 1/4 is left out
    source, x, truth = Pictures(open_items(tmp_path), crop=8).uncropped(0)
    target = whole.crop((0, 0, 48, 40))
    small = target.resize((12, 10), Image.Resampling.BICUBIC)
    assert torch.equal(truth, as_tensor(target))
    assert torch.equal(source, as_tensor(small))
    assert torch.equal(x, as_tensor(small.resize((48, 40), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("scale", [2, 3, 4, 2.5])
def test_crop_equals_the_whole_pictures_window(folder, scale):
    pictures = Pictures(open_items(folder, scale), crop=16, scale=scale, augment="none")
    places = set()
    for epoch in range(40):
        x, y = pictures[epoch, 1]
        _, whole_x, whole_y = pictures.uncropped(1)
        windows = whole_y.unfold(1, 16, 1).unfold(2, 16, 1)
        match = (windows == y[:, None, None]).all(-1).all(-1).all(0).nonzero()
        assert len(match) == 1
        top, left = match[0].tolist()
        places.add((top, left))
        # one 8-bit level: the window's filter weights differ in float32's last place
        assert (x - whole_x[:, top : top + 16, left : left + 16]).abs().max() <= 2 / 255 + 1e-6
    assert len(places) > 5
    assert all(top % scale == 0 and left % scale == 0 for top, left in places) or scale == 2.5


def test_augmentation_gives_the_eight_symmetries_to_both(folder):
    plain = Pictures(open_items(folder), crop=16, augment="none")
    flipped = Pictures(open_items(folder), crop=16, augment="dihedral")
    seen = set()
    for epoch in range(60):
        (x0, y0), (x1, y1) = plain[epoch, 0], flipped[epoch, 0]
        fits = [s for s in range(8) if torch.equal(data.symmetric(y0, s), y1)]
        assert len(fits) == 1
        assert torch.equal(data.symmetric(x0, fits[0]), x1)
        seen.add(fits[0])
    assert seen == set(range(8))


def test_samples_depend_on_seed_index_and_epoch_alone(folder):
    first, second = (Pictures(open_items(folder), crop=8, seed=7) for _ in range(2))
    keys = [(0, 0), (3, 2), (3, 1)]
    for key, (x, y) in zip(keys, first.__getitems__(keys), strict=True):
        assert torch.equal(second[key][0], x) and torch.equal(second[key][1], y)
    other = Pictures(open_items(folder), crop=8, seed=8)
    assert any(not torch.equal(other[key][1], first[key][1]) for key in keys)


def test_folder_of_pairs(tmp_path):
    target, source = picture(tmp_path / "hr", "a.png"), picture(tmp_path / "lr", "a.jpg", (12, 10), seed=5)
    source = Image.open(tmp_path / "lr" / "a.jpg")
    (item,) = open_items(tmp_path, 4)
    small, x, y = Pictures([item], crop=8).uncropped(0)
    assert torch.equal(y, as_tensor(target)) and torch.equal(small, as_tensor(source))
    assert torch.equal(x, as_tensor(source.resize((48, 40), Image.Resampling.BICUBIC)))


def test_a_target_that_must_be_cut_beside_its_source_is_told(tmp_path):
    target = picture(tmp_path / "hr", "a.png", (101, 99))
    (tmp_path / "lr").mkdir()
    source = target.crop((0, 0, 100, 96)).resize((25, 24), Image.Resampling.BICUBIC)
    source.save(tmp_path / "lr" / "a.png")
    with pytest.warns(UserWarning, match="a target that is no 4 times its source is cut at the right and below"):
        items = open_items(tmp_path, 4)
    _, x, y = Pictures(items, crop=16).uncropped(0)
    assert torch.equal(y, as_tensor(target)[:, :96, :100])
    assert torch.equal(x, as_tensor(source.resize((100, 96), Image.Resampling.BICUBIC)))


def turned(folder, name, orientation, **options):
    """A picture of 48 x 40 that a viewer turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = picture(folder, name, **options)
    whole.save(folder / name, exif=exif)
    return whole


def test_pairs_are_matched_after_the_exif_orientation(tmp_path):
    stored = turned(tmp_path / "right" / "hr", "a.png", 6)
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    (tmp_path / "right" / "lr").mkdir()
    source = upright.resize((10, 12), Image.Resampling.BICUBIC)
    source.save(tmp_path / "right" / "lr" / "a.png")
    small, _, y = Pictures(open_items(tmp_path / "right"), crop=8).uncropped(0)
    assert torch.equal(y, as_tensor(upright)) and torch.equal(small, as_tensor(source))
    turned(tmp_path / "wrong" / "hr", "a.png", 6)
    picture(tmp_path / "wrong" / "lr", "a.png", (12, 10))  # of the pixels as they are stored
    with pytest.raises(DataError, match="got target 48 x 40, source 10 x 12"):
        open_items(tmp_path / "wrong")


def test_pairs_are_matched_again_when_they_are_decoded(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "hr", name)
        picture(tmp_path / "lr", name, (12, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = (tmp_path / "hr" / "a.png").read_bytes()
    (tmp_path / "hr" / "a.png").write_bytes(data[:-12] + chunk + data[-12:])  # behind the pixels: no header tells it
    pictures = Pictures(open_items(tmp_path), crop=8)
    with pytest.warns(Skipped, match="skipped a: .* got target 48 x 40, source 10 x 12"):
        assert pictures.load(0)[0] is pictures.load(1)[0]


def test_janspiry_folders_take_sr_as_x(tmp_path):
    target = picture(tmp_path / "hr_32", "00000.png", (32, 32))
    x = picture(tmp_path / "sr_8_32", "00000.png", (32, 32), seed=3)
    picture(tmp_path / "lr_8", "00000.png", (8, 8), seed=4)
    _, got, y = Pictures(open_items(tmp_path), crop=16).uncropped(0)
    assert torch.equal(got, as_tensor(x)) and torch.equal(y, as_tensor(target))


def test_janspiry_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    images = [picture(tmp_path, f"{i}.png", (16, 16), seed=i) for i in range(4)]
    with lmdb.open(str(tmp_path / "db"), map_size=2**20) as db, db.begin(write=True) as transaction:
        for i in range(2):
            for key, j in ((f"hr_16_{i:05d}", i), (f"sr_4_16_{i:05d}", i + 2)):
                transaction.put(key.encode(), (tmp_path / f"{j}.png").read_bytes())
        transaction.put(b"length", b"2")
    pictures = Pictures(open_items(tmp_path / "db"), crop=8)
    assert len(pictures) == 2
    _, x, y = pictures.uncropped(1)
    assert torch.equal(y, as_tensor(images[1])) and torch.equal(x, as_tensor(images[3]))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_arrays_of_any_channels(tmp_path, dtype):
    rng = np.random.default_rng(0)
    array = rng.uniform(-1, 1, (2, 13, 16, 24)).astype("float32")
    if dtype != "float32":
        array = rng.integers(0, np.iinfo(dtype).max + 1, array.shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    pictures = Pictures(open_items(tmp_path / "a.npy"), crop=8, channels=13)
    source, x, y = pictures.uncropped(1)
    assert (source.shape, x.shape) == ((13, 4, 6), (13, 16, 24))
    levels = 1 if dtype == "float32" else np.iinfo(dtype).max
    expected = array[1] if levels == 1 else array[1].astype(np.float32) / levels * 2 - 1
    assert np.abs(y.numpy() - expected).max() <= 2e-7
    channel = Image.fromarray(array[1, 5] if dtype == "uint8" else array[1, 5].astype("float32"))
    small = np.asarray(channel.resize((6, 4), Image.Resampling.BICUBIC), dtype=np.float64)
    small = small.clip(-1, 1) if levels == 1 else small.round().clip(0, levels) / levels * 2 - 1
    assert np.abs(source[5].numpy() - small).max() <= 2e-7


def test_gray_is_repeated_and_other_channels_are_refused(tmp_path):
    picture(tmp_path, "g.png", mode="L")
    x, y = Pictures(open_items(tmp_path), crop=8)[0, 0]
    assert x.shape == y.shape == (3, 8, 8) and torch.equal(y[0], y[2])
    picture(tmp_path / "rgb", "c.png")
    with pytest.raises(DataError, match="network has 1 channels, the picture has 3"):
        Pictures(open_items(tmp_path / "rgb"), crop=8, channels=1)[0, 0]


def test_channels_that_do_not_fit_are_told_at_the_start(tmp_path):
    for name, mode in (("a.png", "L"), ("b.png", "RGB"), ("c.png", "L")):
        picture(tmp_path, name, mode=mode)
    np.save(tmp_path / "d.npy", np.zeros((2, 40, 48), np.uint8))
    with pytest.warns(Skipped) as told:
        pictures = Pictures(open_items(tmp_path), crop=8, channels=1)
    assert [str(w.message).split("/")[-1] for w in told] == [
        f"{name}: the network has 1 channels, the picture has {count}" for name, count in (("b.png", 3), ("d.npy", 2))
    ]
    assert len(pictures) == 2
    pairs = tmp_path / "pairs"
    for name, mode in (("a.png", "L"), ("b.png", "RGB")):
        picture(pairs / "hr", name, mode="L")
        picture(pairs / "lr", name, (12, 10), mode=mode)
    with pytest.warns(Skipped, match="b: the network has 1 channels, the picture has 3"):
        assert len(Pictures(open_items(pairs), crop=8, channels=1)) == 1


def test_memory_is_bounded(folder):
    pictures = Pictures(open_items(folder), crop=8, memory=2 * 48 * 40 * 3)
    for index in (0, 1, 2, 0):
        pictures[0, index]
    assert list(pictures._kept) == [2, 0]


def test_broken_files_are_named_and_skipped(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:1500])  # its header is whole
    (folder / "9.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="skipped .*9.png"):
        items = open_items(folder)
    pictures = Pictures(items, crop=8, augment="none")
    with pytest.warns(UserWarning, match="skipped .*1.png"):
        x, _ = pictures[0, 1]
    assert x.shape == (3, 8, 8)
    assert pictures.load(1)[0] is pictures.load(2)[0]


def test_broken_headers_are_named_and_skipped(folder):
    (folder / "empty.npy").touch()
    np.save(folder / "cut.npy", np.zeros((3, 40, 48), np.uint8))
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:200])
    np.save(folder / "flat.npy", np.zeros((40, 48), np.uint8))
    np.save(folder / "long.NPY", np.zeros((3, 40, 48), np.int64))
    (folder / "long.NPY.npy").rename(folder / "long.NPY")
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)  # more than Pillow's limit
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + bytes(4) + b"IDAT" + bytes(4)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.warns(Skipped) as told:
        items = open_items(folder)
    assert [item.name for item in items] == [str(folder / f"{i}.png") for i in range(3)]
    assert {str(w.message).split("/")[-1].split(": ")[0] for w in told} == {
        *("bomb.png", "empty.npy", "cut.npy", "flat.npy", "long.NPY"),
    }
    for name in ("empty.npy", "cut.npy"):
        with pytest.raises(DataError, match=f"{name}: a broken array"):
            open_items(folder / name)


def test_values_out_of_range_are_skipped(tmp_path):
    for name, value in (("a.npy", 2.0), ("b.npy", 0.5), ("c.npy", float("nan"))):
        np.save(tmp_path / name, np.full((3, 16, 16), value))
    pictures = Pictures(open_items(tmp_path), crop=8)
    with pytest.warns(Skipped, match=r"a\.npy: float values must lie in \[-1, 1\]: got 2\.0 \.\. 2\.0"):
        assert pictures.load(0)[0].max() == 0.5
    with pytest.warns(Skipped, match=r"c\.npy: float values"):
        assert pictures.load(2)[0].max() == 0.5


def test_refusals(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures there"):
        open_items(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        open_items(tmp_path / "absent")
    with pytest.raises(DataError, match=r"0\.png: a picture must hold a crop of 64 .* got 40 x 48"):
        Pictures(open_items(folder), crop=64)
    picture(tmp_path / "pairs" / "hr", "a.png")
    picture(tmp_path / "pairs" / "lr", "b.png", (12, 10))
    with pytest.raises(DataError, match=r"needs a partner: a is in .*hr, not in .*lr"):
        open_items(tmp_path / "pairs")
    (tmp_path / "pairs" / "lr" / "b.png").rename(tmp_path / "pairs" / "lr" / "a.png")
    with pytest.raises(DataError, match="target 40 x 48, source 10 x 12"):
        open_items(tmp_path / "pairs", 2)
    np.save(tmp_path / "wide.npy", np.full((1, 3, 8, 8), 2.0))
    with pytest.warns(Skipped), pytest.raises(DataError, match=r"none of the 1 .* \[-1, 1\]: got 2.0 .. 2.0"):
        Pictures(open_items(tmp_path / "wide.npy"), crop=8)[0, 0]
    with pytest.raises(ValueError, match="scale must be more than 1: got 1"):
        Pictures(open_items(folder), scale=1)


def test_order_covers_epochs_splits_over_ranks_and_resumes():
    def take(count, **options):
        return list(itertools.islice(Order(10, **options), count))

    whole = take(40, batch=4, seed=3)
    for epoch in range(4):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == [(epoch, i) for i in range(10)]
    assert [i for _, i in whole[:10]] != [i for _, i in whole[10:20]]
    assert take(20, batch=4, seed=3, start=5) == whole[20:]
    ranks = [take(20, batch=2, seed=3, rank=rank, world=2) for rank in range(2)]
    merged = [key for i in range(0, 20, 2) for rank in ranks for key in rank[i : i + 2]]
    assert merged == whole
    assert take(10, batch=2, seed=3, rank=1, world=2, start=5) == ranks[1][10:]


def test_names_like_janspirys_are_no_folders_of_theirs(tmp_path):
    for name in ("a.png", "sr_x_y.png", "sr_16_64.png"):
        picture(tmp_path, name)
    assert len(open_items(tmp_path)) == 3
    for name in ("hr_64", "sr_16_64"):
        picture(tmp_path / name, "a.png", (64, 64))
    with pytest.raises(DataError, match=r"sr_16_64 is 4 times, not 2: give scale=4 \(--scale\)"):
        open_items(tmp_path, 2)
    assert len(open_items(tmp_path, 4)) == 1
    for name in ("hr_64", "sr_16_64", "sr_8_64"):
        picture(tmp_path / name, "0.png", (64, 64))
    with pytest.raises(DataError, match="several of Janspiry's folders, keep one: got sr_16_64, sr_8_64"):
        open_items(tmp_path)


def test_two_pictures_of_one_name_are_told(tmp_path):
    for name in ("a.png", "a.jpg"):
        picture(tmp_path / "hr", name)
    picture(tmp_path / "lr", "a.png", (12, 10))
    with pytest.raises(DataError, match=r"names without their suffix tell pairs: .*hr has a\.jpg and a\.png"):
        open_items(tmp_path)


def test_hidden_folders_are_left_out(tmp_path):
    hidden = tmp_path / ".hidden"
    for folder in (hidden, hidden / ".thumbnails", hidden / "in"):
        picture(folder, "a.png")
    assert [Path(item.name).relative_to(hidden) for item in open_items(hidden)] == [Path("a.png"), Path("in/a.png")]
