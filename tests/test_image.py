"""Pictures in and out: every mode, exact rounding, atomic files, and what is refused."""

import errno
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin

from sr3fast import image

RNG = np.random.default_rng(0)


def smooth(height, width, channels=3):
    """A uint8 array of soft blobs, [H, W, C]: bicubic neither rings past 0 nor past 255 much."""
    h, w = np.mgrid[:height, :width]
    waves = [127.5 + 100 * np.sin(h / (3 + c) + c) * np.cos(w / (4 + c)) for c in range(channels)]
    return np.stack(waves, -1).round().astype(np.uint8)


def picture(mode, size=(9, 7)):
    width, height = size
    values = smooth(height, width, 4)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257 + 3)
    if mode in ("LA", "La", "PA"):
        return Image.merge("LA", [Image.fromarray(values[..., c]) for c in (0, 3)]).convert(mode)
    if mode == "RGBA":
        return Image.fromarray(values, "RGBA")
    return Image.fromarray(np.ascontiguousarray(values[..., :3])).convert(mode)


# Tensors


def test_to_tensor_and_back_is_exact_for_every_value():
    for levels, dtype in ((255, np.uint8), (65535, np.uint16)):
        values = np.arange(levels + 1, dtype=dtype).reshape(1, -1)
        source = Image.fromarray(values.astype(np.float32))
        tensor = image.to_tensor(source, levels)
        assert tensor.dtype == torch.float32 and tensor.shape == (1, 1, levels + 1)
        assert tensor.min() == -1 and tensor.max() == 1
        assert np.array_equal(np.asarray(image.to_picture(tensor, levels)), values)


def test_quantize_clamps_and_rounds_half_to_even():
    # (v + 1) / 2 * 255 is exactly 63.75, 127.5 (to 128), and out of range on both sides
    assert image.quantize(torch.tensor([-0.5, 0.0, -7.0, 3.0])).tolist() == [64, 128, 0, 255]


def test_to_picture_refuses_other_channels():
    with pytest.raises(ValueError, match=r"got \[2, 4, 4\]"):
        image.to_picture(torch.zeros(2, 4, 4))


@pytest.mark.parametrize("size", [(28, 36), (5, 4), (13, 3)])
def test_resize_is_pillows_bicubic(size):
    """On floats the filter is the same to float32 rounding; on 8 bits to Pillow's own rounding."""
    height, width = size
    values = smooth(9, 7)
    for channel in range(3):
        plane = values[..., channel].astype(np.float32)
        ours = image.resize(torch.from_numpy(plane)[None], size)[0].numpy()
        pillow = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        assert np.abs(ours - pillow).max() <= 255 * 4 * np.finfo(np.float32).eps
        rounded = np.asarray(image.bicubic(Image.fromarray(values[..., channel]), (width, height)))
        assert np.abs(ours.clip(0, 255) - rounded).max() <= 1.01  # rounded after each of the two passes


def test_resize_takes_batches():
    values = torch.randn(2, 3, 8, 6)
    assert torch.equal(image.resize(values, (4, 3))[1], image.resize(values[1], (4, 3)))


@pytest.mark.parametrize(("height", "width", "multiple"), [(5, 7, 4), (2, 3, 16), (8, 8, 8)])
def test_reflect_pad(height, width, multiple):
    values = torch.arange(height * width, dtype=torch.float32).reshape(1, height, width)
    padded = image.reflect_pad(values, multiple)
    down, right = -height % multiple, -width % multiple
    expected = np.pad(values.numpy(), ((0, 0), (0, down), (0, right)), mode="reflect")
    assert np.array_equal(padded.numpy(), expected)


@pytest.mark.parametrize(
    ("size", "scale", "large", "small"),
    [((70, 66), 4, (68, 64), (17, 16)), ((66, 7), 1.1, (66, 7), (60, 6)), ((7, 19), 2.5, (5, 18), (2, 7))],
)
def test_divisible(size, scale, large, small):
    assert image.divisible(size, scale) == (large, small)  # 66 / 1.1 is 59.99999999999999


# Photos: modes


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_photo_of_a_mode_it_keeps_is_exact(mode):
    source = picture(mode)
    photo = image.Photo.of(source)
    assert photo.mode == mode and photo.size == (9, 7)
    back = photo.with_color(photo.tensor(3))
    assert back.mode == mode
    assert np.array_equal(np.asarray(back), np.asarray(source))


@pytest.mark.parametrize(
    ("mode", "becomes"),
    [
        ("1", "L"),
        ("La", "LA"),
        ("P", "RGB"),
        ("PA", "RGBA"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
        ("HSV", "RGB"),
    ],
)
def test_photo_of_other_modes(mode, becomes):
    source = picture(mode)
    photo = image.Photo.of(source)
    assert photo.mode == becomes
    color = becomes.rstrip("A")
    expected = (source.convert(becomes) if mode in ("La", "PA") else source).convert(color)
    assert np.array_equal(np.asarray(photo.color), np.asarray(expected))


def test_sixteen_bits_keep_their_low_byte_when_resized():
    photo = image.Photo.of(picture("I;16")).resized((36, 28))
    values = np.asarray(photo.with_color(photo.tensor(3)))
    assert values.dtype == np.uint16 and values.shape == (28, 36)
    assert len(np.unique(values & 255)) > 50
    plane = np.asarray(picture("I;16")).astype(np.float32)
    pillow = np.asarray(Image.fromarray(plane).resize((36, 28), Image.Resampling.BICUBIC))
    assert np.abs(values - pillow.clip(0, 65535)).max() <= 0.51


@pytest.mark.parametrize("mode", ["I", "I;16B"])
def test_other_sixteen_bit_modes(mode):
    values = np.asarray(picture("I;16"))
    if mode == "I":
        source = Image.fromarray(values.astype(np.int32))
    else:
        source = Image.frombytes("I;16B", (9, 7), values.astype(">u2").tobytes())
    photo = image.Photo.of(source)
    assert np.array_equal(np.asarray(photo.color), values.astype(np.float32))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tiff"])
@pytest.mark.parametrize("by", ["exif", "xmp"])
def test_a_picture_is_turned_once(tmp_path, suffix, by):
    upright = Image.fromarray(smooth(40, 20))
    stored, file = upright.transpose(Image.Transpose.ROTATE_90), tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if by == "xmp" and suffix == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        stored.save(file, pnginfo=info)
    elif by == "xmp" and suffix == "tiff":
        stored.save(file, tiffinfo={700: xmp})
    else:
        quality = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
        stored.save(file, **({"exif": exif} if by == "exif" else {"xmp": xmp}), **quality)
    with Image.open(file) as opened:
        opened.load()
        expected = ImageOps.exif_transpose(opened)
    read = image.read(file)
    photos = image.Photo.read(file), image.Photo.of(Image.open(file)), image.Photo.of(read)
    for picture in (read, *(photo.color for photo in photos)):
        assert picture.size == expected.size and picture.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    if by == "exif":
        assert read.size == (20, 40)


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_keeps_them_or_says_so(tmp_path, color_type, channels):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    values = RNG.integers(0, 65536, (5, 6, channels))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 5, 16, color_type, 0, 0, 0)), chunk(b"IDAT", zlib.compress(rows))
    file = tmp_path / "deep.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))
    if channels == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(np.asarray(image.Photo.read(file).color), values[..., 0])
    else:
        image._tell_that_bits_are_lost.cache_clear()
        with pytest.warns(UserWarning, match="16 bits a channel are read as 8, Pillow's way"):
            photo = image.Photo.read(file)
        assert np.array_equal(np.asarray(photo.color)[..., 0], values[..., 0] >> 8)


def test_ranges_that_are_not_known_are_refused():
    with pytest.raises(image.ImageError, match="no fixed range"):
        image.Photo.of(Image.fromarray(np.zeros((3, 3), np.float32)))
    with pytest.raises(image.ImageError, match=r"0 \.\. 65535: got -4 \.\. -4"):
        image.Photo.of(Image.fromarray(np.full((3, 3), -4, np.int32)))


def test_transparent_colour_of_a_palette_and_of_rgb_becomes_alpha(tmp_path):
    colors = np.zeros((4, 5, 3), np.uint8)
    colors[1, 2] = (10, 200, 30)
    for name, source, key in (
        ("rgb.png", Image.fromarray(colors), (10, 200, 30)),
        ("p.png", Image.fromarray(colors).quantize(4), None),
    ):
        if key is None:
            key = source.getpixel((2, 1))
        source.save(tmp_path / name, transparency=key)
        photo = image.Photo.of(image.read(tmp_path / name))
        alpha = np.asarray(photo.alpha)
        assert photo.mode == "RGBA" and alpha[1, 2] == 0 and alpha.sum() == 19 * 255


def test_alpha_is_resized_by_pillow():
    source = picture("RGBA")
    photo = image.Photo.of(source).resized((18, 14))
    expected = source.getchannel("A").resize((18, 14), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(photo.alpha), np.asarray(expected))


def test_channels_of_a_gray_picture_are_averaged():
    photo = image.Photo.of(picture("L", (2, 2)))
    values = torch.tensor([-0.2, 0.1, 0.4]).reshape(3, 1, 1).expand(3, 2, 2)
    assert np.asarray(photo.with_color(values)).tolist() == [[140, 140], [140, 140]]  # (0.1 + 1) / 2 * 255


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(image.ImageError, match="network of 1 channels cannot take a picture of 3"):
        image.Photo.of(picture("RGB")).tensor(1)


# Files


def test_icc_profile_survives_read_and_write(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture("RGB").save(tmp_path / "in.png", icc_profile=profile)
    photo = image.Photo.of(image.read(tmp_path / "in.png"))
    image.write(photo.with_color(photo.tensor()), tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").info["icc_profile"] == profile


TAGS = ExifTags.Base


def exif():
    """Of a photograph that a camera turned: what is worth keeping, and what is of its file alone."""
    made = Image.Exif()
    made.update({TAGS.Model: "A camera", TAGS.DateTime: "2024:05:06 07:08:09", TAGS.Orientation: 6})
    made.update({TAGS.ImageWidth: 9, TAGS.ImageLength: 7, TAGS.StripOffsets: 8})
    old = {TAGS.ExifImageWidth: 9, TAGS.ExifImageHeight: 7, TAGS.MakerNote: b"\1" * 9}
    made[ExifTags.IFD.Exif] = {TAGS.ExposureTime: 0.004} | old
    made[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (50.0, 30.0, 1.5)}
    return made


@pytest.mark.parametrize("result", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("source", ["png", "jpg", "webp", "tif"])
def test_exif_and_dpi_survive_less_what_is_of_the_old_file(tmp_path, source, result):
    picture("RGB").save(tmp_path / f"in.{source}", exif=exif().tobytes(), dpi=(240, 200))
    photo = image.Photo.read(tmp_path / f"in.{source}").resized((14, 18))
    image.write(photo.with_color(photo.tensor()), tmp_path / f"out.{result}")
    with Image.open(tmp_path / f"out.{result}") as made:
        assert made.size == (14, 18)
        kept = made.getexif()
        assert kept[TAGS.Model] == "A camera" and kept[TAGS.DateTime] == "2024:05:06 07:08:09"
        assert TAGS.Orientation not in kept
        assert kept.get_ifd(ExifTags.IFD.Exif) == {TAGS.ExposureTime: 0.004}
        assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (50.0, 30.0, 1.5)
        assert not kept.get_ifd(ExifTags.IFD.IFD1)
        if result == "tif":
            assert (kept[TAGS.ImageWidth], kept[TAGS.ImageLength]) == (14, 18)
        else:
            assert not {TAGS.ImageWidth, TAGS.ImageLength, TAGS.StripOffsets} & kept.keys()
        if "webp" not in (source, result):  # which holds none
            assert made.info["dpi"] == pytest.approx((240, 200), abs=0.01)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "ppm", "tga"])
def test_a_format_without_exif_is_written(tmp_path, suffix):
    picture("RGB").save(tmp_path / "in.jpg", exif=exif(), dpi=(240, 200))
    photo = image.Photo.read(tmp_path / "in.jpg")
    image.write(photo.with_color(photo.tensor()), tmp_path / f"out.{suffix}")
    assert image.read(tmp_path / f"out.{suffix}").size == (7, 9)


def test_metadata_that_cannot_be_kept_does_not_cost_the_picture(tmp_path):
    long, broken = picture("RGB"), picture("RGB")
    made = exif()
    made[ExifTags.IFD.Exif] = {TAGS.UserComment: bytes(70000)}  # more than a JPEG's 65533
    long.info.update(exif=made.tobytes(), dpi=(float("nan"), 1e9))
    broken.info["exif"] = b"Exif\0\0no TIFF"
    for source in (long, broken):
        photo = image.Photo.of(source)
        assert photo.info == {}
        image.write(photo.with_color(photo.tensor()), tmp_path / "out.jpg")
        image.write(source, tmp_path / "out.jpg")


def test_jpeg_and_webp_are_written_well(tmp_path):
    source = picture("RGB", (64, 48))
    for suffix, options in (("jpg", {"quality": 95, "subsampling": 0}), ("webp", {"quality": 95})):
        image.write(source, tmp_path / f"x.{suffix}")
        source.save(tmp_path / f"y.{suffix}", **options)
        assert (tmp_path / f"x.{suffix}").read_bytes() == (tmp_path / f"y.{suffix}").read_bytes()
        image.write(source, tmp_path / f"low.{suffix}", quality=30)
        assert (tmp_path / f"low.{suffix}").stat().st_size < (tmp_path / f"x.{suffix}").stat().st_size
    with Image.open(tmp_path / "x.jpg") as made:
        assert JpegImagePlugin.get_sampling(made) == 0  # 4:4:4
    image.write(picture("L"), tmp_path / "gray.jpg")
    assert image.read(tmp_path / "gray.jpg").mode == "L"


def test_suffixes_of_pictures(tmp_path):
    known = Image.registered_extensions()
    unknown = {s for s in image.SUFFIXES if s not in known or known[s] not in {*Image.OPEN, "MPO"}}  # opened as JPEG
    assert unknown <= {".avif", ".webp", ".jp2", ".j2k"}, "not every build of Pillow has these"
    assert not {".pdf", ".h5", ".mpg", ".eps"} & {*image.SUFFIXES}
    (tmp_path / "deep" / "folder.png").mkdir(parents=True)
    for name in ("b.JPG", "deep/a.png", "report.pdf", "data.h5", ".c.png", "x.npy"):
        (tmp_path / name).touch()
    assert [p.name for p in image.files(tmp_path)] == ["b.JPG", "a.png"]
    assert [p.name for p in image.files(tmp_path, (".npy",))] == ["x.npy"]


def test_lab_becomes_srgb():
    lab = Image.merge("LAB", [Image.new("L", (2, 2), v) for v in (255, 128, 128)])  # white: L* 100, a* = b* = 0
    assert np.asarray(image.Photo.of(lab).color).min() >= 252


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    source = picture("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    source.save(tmp_path / "turned.png", exif=exif)
    values = np.asarray(source)
    expected = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: values[::-1].transpose(1, 0, 2),
        7: values[::-1, ::-1].transpose(1, 0, 2),
        8: values[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert np.array_equal(np.asarray(image.read(tmp_path / "turned.png")), expected)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_size_that_read_gives(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture("RGB").save(tmp_path / f"turned.{suffix}", exif=exif)
    size, channels = image.header(tmp_path / f"turned.{suffix}")
    assert size == image.read(tmp_path / f"turned.{suffix}").size == ((7, 9) if orientation > 4 else (9, 7))
    assert channels == 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P", "RGB", "RGBA"])
def test_a_header_tells_the_channels_that_a_photo_has(tmp_path, mode):
    picture(mode).save(tmp_path / "x.png")
    assert image.header(tmp_path / "x.png")[1] == len(image.Photo.read(tmp_path / "x.png").tensor())


def test_a_header_is_read_without_the_pixels(tmp_path):
    picture("RGB").save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:60])
    assert image.header(tmp_path / "x.png") == ((9, 7), 3)
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(image.ImageError, match=r"f\.tif: a picture of mode F has no fixed range"):
        image.header(tmp_path / "f.tif")


class Stream:
    """A file that cannot be rewound, as a connection is."""

    def __init__(self, data):
        self.read = io.BytesIO(data).read


def test_files_that_are_open(tmp_path):
    picture("RGB").save(tmp_path / "x.png")
    expected, data = np.asarray(picture("RGB")), (tmp_path / "x.png").read_bytes()
    with open(tmp_path / "x.png", "rb") as file:
        for opened in (file, io.BytesIO(data), Stream(data), tmp_path / "x.png", str(tmp_path / "x.png")):
            assert np.array_equal(np.asarray(image.read(opened)), expected)
        assert not file.closed
        file.read()
        assert image.header(file) == ((9, 7), 3)
    for bad, rule in ((b"", "0 bytes"), (data[:60], "cut short"), (b"hello", "not an image"), (bomb(12000), "parts")):
        for opened in (io.BytesIO(bad), Stream(bad)):
            with pytest.raises(image.ImageError, match=rule):
                image.Photo.read(opened)
    with open(tmp_path / "x.png") as text, pytest.raises(TypeError, match="opened in binary"):
        image.read(text)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(image.ImageError, match=r"text\.png: not an image"):
        image.read(tmp_path / "text.png")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(image.ImageError, match=r"empty \(0 bytes\)"):
        image.read(tmp_path / "empty.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(image.ImageError) as error:
        image.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_pixel_format_that_pillow_does_not_know_is_refused(tmp_path):
    header = struct.pack("<31I", 124, 0x1007, 4, 4, 0, 0, 0, *[0] * 11, 32, 0x80000000, *[0] * 11)
    (tmp_path / "x.dds").write_bytes(b"DDS " + header + bytes(64))
    with pytest.raises(image.ImageError, match=r"x\.dds: cut short or broken \(Unknown pixel format"):
        image.read(tmp_path / "x.dds")


def test_a_picture_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    def full(self):
        raise MemoryError

    picture("RGB").save(tmp_path / "x.bmp")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(image.ImageError, match=r"x\.bmp: too large for this machine's memory"):
        image.read(tmp_path / "x.bmp")


def bomb(side):
    """A valid PNG header of side x side, 8-bit gray, with no pixels behind it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [30000, 12000])  # Pillow refuses the first by itself, and takes the second
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, side, recwarn):
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    with pytest.raises(image.ImageError, match=r"bomb\.png: .*(pixels).*parts first"):
        image.read(tmp_path / "bomb.png")
    assert not recwarn.list


def test_write_is_atomic_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"the old one")

    def full(self, file, **options):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left on the disk: free some") as error:
        image.write(picture("RGB"), path)
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"] and path.read_bytes() == b"the old one"


def test_write_makes_the_folder_and_leaves_one_file(tmp_path):
    image.write(picture("RGB"), tmp_path / "a" / "b" / "out.png")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out.png"]
    assert np.array_equal(np.asarray(image.read(tmp_path / "a" / "b" / "out.png")), np.asarray(picture("RGB")))


def test_formats_that_cannot_hold_the_picture_are_refused():
    image.check_format("x.png", "RGBA")
    with pytest.raises(image.ImageError, match=r"JPEG cannot hold a picture of mode RGBA: save it as \.png"):
        image.check_format("x.jpg", "RGBA")
    with pytest.raises(image.ImageError, match=r"\.xyz names no image format to write"):
        image.check_format("x.xyz", "RGB")


def test_a_file_of_every_format_is_read(tmp_path):
    for suffix in ("png", "bmp", "tif"):
        buffer = io.BytesIO()
        picture("RGB").save(buffer, format={"tif": "TIFF"}.get(suffix, suffix.upper()))
        (tmp_path / f"x.{suffix}").write_bytes(buffer.getvalue())
        assert np.array_equal(np.asarray(image.read(tmp_path / f"x.{suffix}")), np.asarray(picture("RGB")))


def test_a_turned_photograph_with_an_odd_tag_is_read(tmp_path):
    """A maker that is a number: writing this EXIF anew fails."""
    source = picture("RGB")
    little = struct.pack("<2sHIH", b"II", 42, 8, 2)
    tags = struct.pack("<HHIf", 0x010F, 11, 1, 1.5) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    source.save(tmp_path / "odd.png", exif=b"Exif\0\0" + little + tags + struct.pack("<I", 0))
    turned = image.read(tmp_path / "odd.png")
    assert np.array_equal(np.asarray(turned), np.asarray(source.transpose(Image.Transpose.ROTATE_270)))
    assert image.header(tmp_path / "odd.png")[0] == turned.size
    image.write(turned, tmp_path / "out.png")


def test_a_name_that_would_be_falsified_is_left_out(tmp_path):
    made = Image.Exif()
    made[ExifTags.Base.Make], made[ExifTags.Base.Artist] = "Maker", "J\u00fcrgen".encode()
    picture("RGB").save(tmp_path / "in.jpg", exif=made.tobytes())
    image.write(image.read(tmp_path / "in.jpg"), tmp_path / "out.jpg")
    kept = Image.open(tmp_path / "out.jpg").getexif()
    assert kept[ExifTags.Base.Make] == "Maker" and ExifTags.Base.Artist not in kept


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".jpg"])
def test_formats_without_16_bits_are_refused(tmp_path, suffix):
    picture = Image.fromarray(np.full((8, 8), 30000, np.uint16))
    for refuse in (image.check_format, lambda path, mode: image.write(picture, path)):
        with pytest.raises(image.ImageError, match=r"cannot hold a picture of|names no image format"):
            refuse(tmp_path / f"a{suffix}", picture.mode)
    assert not list(tmp_path.iterdir())
    for kept in (".png", ".tif"):
        image.write(picture, tmp_path / f"a{kept}")
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"a{kept}")), np.asarray(picture))
