"""Pictures of any size and mode through the network, whole and in windows."""

import io
import logging
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sr3fast import device, image, noise, ops
from sr3fast.sampler import Sampler
from sr3fast.schedule import Schedule
from sr3fast.unet import UNet
from sr3fast.upscaling import Spread, Tiled, Trace, Upscaler, upscale, windows
from sr3fast.weights import Model, Target

SCHEDULE = Schedule.named("linear", T=200, start=1e-4, end=5e-2)


def unet(channels=3, **options):
    torch.manual_seed(0)
    config = {
        "channels": 8,
        "multipliers": (1, 1, 2),
        "blocks": 1,
        "attention": (),
        "groups": 4,
        "dropout": 0.0,
    }
    net = UNet(**config | {"in_channels": 2 * channels, "out_channels": channels, "image_size": 32} | options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return net.eval().requires_grad_(False)


def model(channels=3, **options):
    fields = {"target": Target("residual", 4.0), "scale": 4, "level": "sqrt_gamma", "card": {"steps": 3}}
    return Model(unet=unet(channels), schedule=SCHEDULE, **fields | options)


def blobs(width, height, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = image.resize(0.8 * torch.randn(channels, 4, 5, generator=generator), (height, width))
    return image.to_picture(values.clamp(-1, 1))


def array(picture):
    return np.asarray(picture).astype(np.float64)


# Windows


@pytest.mark.parametrize("length", [4, 60, 64, 68, 124, 256, 1000, 2400])
@pytest.mark.parametrize(("tile", "multiple"), [(64, 4), (32, 4), (100, 4), (512, 8), (64, 1)])
def test_windows_cover_the_side_and_their_weights_sum_to_one(length, tile, multiple):
    length = -(-length // multiple) * multiple
    starts, weights = windows(length, tile, multiple)
    n, window = weights.shape
    assert len(starts) == n and window <= tile and window % multiple == 0
    assert starts[0] == 0 and starts[-1] + window == length and all(s % multiple == 0 for s in starts)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + window] += weight
    assert (total - 1).abs().max() <= 2**-23
    overlaps = [a + window - b for a, b in pairwise(starts)]
    assert all(overlap >= max(tile // 8, 4) for overlap in overlaps)
    # where a window begins inside the picture it saw its own padding: no weight there
    assert all(weight[: -(-overlap // 8)].sum() == 0 for weight, overlap in zip(weights[1:], overlaps, strict=True))


def test_no_more_windows_than_needed():
    starts, weights = windows(2400, 512, 8)
    assert len(starts) == 6 and weights.shape[1] == 456  # (2400 + 5 * 64) / 6, rounded up to a multiple of 8


class Local(nn.Module):
    """A convolution that sees 3 x 3 pixels, and the level."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(6, 3, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x, y_t, level):
        return self.conv(torch.cat([x, y_t], 1)) * (1 + level.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("batch", [None, 1, 3, 64])
def test_a_local_network_gives_the_same_in_windows_to_rounding(batch):
    """Where the overlap is wider than what the network sees, windows change nothing but the rounding."""
    x, y_t = torch.randn(2, 2, 3, 90, 131, generator=torch.Generator().manual_seed(2))
    level = torch.full((2, 1), 0.3)
    net = Local()
    whole = net(x, y_t, level)
    tiled = Tiled(net, 40, batch=batch)(x, y_t, level)
    exact = net.double()(x.double(), y_t.double(), level.double())
    limit = 2 * (whole - exact).abs().max() + 2**-23 * exact.abs().max()
    assert (tiled - exact).abs().max() <= limit


def test_a_tiled_run_of_the_sampler_is_the_whole_one_for_a_local_network():
    """Noise and state are global: the same picture after all steps."""
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    whole = Sampler(Local(), SCHEDULE, steps=4, solver="sde-dpm++2m")(x, 5)
    tiled = Sampler(Tiled(Local(), 40), SCHEDULE, steps=4, solver="sde-dpm++2m")(x, 5)
    assert whole.std() > 0.1
    assert (tiled - whole).abs().max() <= 1e-5


def test_every_window_gets_its_own_level_and_source():
    """Rows of a run differ by their level, windows by their x: nothing is left from the one before."""

    class Echo(nn.Module):
        def forward(self, x, y_t, level):
            return x * level.reshape(-1, 1, 1, 1) + 0 * y_t

    x = torch.randn(1, 3, 80, 72, generator=torch.Generator().manual_seed(4))
    run = Tiled(Echo(), 32, batch=2).start_run(x, x.shape, torch.tensor([0.5, 0.25]))
    run.into.zero_()
    for i, level in ((0, 0.5), (1, 0.25), (0, 0.5)):
        assert (run(i) - level * x).abs().max() < 1e-6


def test_a_unet_in_windows_is_near_the_whole_one():
    """GroupNorm sees a window's statistics, not the picture's: the results differ, but little."""
    picture = blobs(48, 40)
    whole = array(upscale(picture, model(), tile=0, seed=3))
    tiled = array(upscale(picture, model(), tile=64, seed=3))
    assert np.abs(tiled - whole).mean() < 4  # of 255


def test_windows_leave_no_seam():
    """On smooth inputs, tiled minus whole changes from column to column no more at a seam than anywhere.

    The largest change is 2.7 times the median one; with an even mean of the windows it is 4.7 times, with a
    cut in the middle of the overlap 5.1, with a cut where a window ends 8.8.
    """
    generator = torch.Generator().manual_seed(5)
    x, y_t = image.resize(torch.randn(2, 3, 4, 5, generator=generator), (160, 192))[:, None]
    net, level = unet(), torch.full((1, 1), 0.5)
    difference = Tiled(net, 64)(x, y_t, level) - net(x, y_t, level)
    change = difference.diff(dim=3).abs().mean((0, 1, 2))[8:-8]  # at the picture's borders the network pads too
    assert change.max() <= 3.5 * change.median()


def test_tile_is_checked():
    with pytest.raises(ValueError, match=r"tile must be 0 \(none\) or at least 32 for this network: got 8"):
        Tiled(unet(), 8)
    with pytest.raises(ValueError, match=r"tile must be 0 \(none\) or at least 16 for this network: got -1"):
        Tiled(Local(), -1)
    with pytest.raises(ValueError, match="batch must be at least 1: got 0"):
        Tiled(Local(), batch=0)


# Pictures


@pytest.mark.parametrize("size", [(2, 2), (3, 17), (16, 16), (13, 9)])
def test_any_size(size):
    result = upscale(blobs(*size), model())
    assert result.size == (4 * size[0], 4 * size[1]) and result.mode == "RGB"


def test_the_result_is_the_samplers_own():
    """upscale is bicubic, padding, Sampler, decode, cut: written out here."""
    picture = blobs(11, 9)
    m = model()
    x = image.to_tensor(picture.resize((44, 36), Image.Resampling.BICUBIC))[None]
    y_0 = Sampler(m.unet, SCHEDULE, steps=3)(x, 7)
    expected = image.to_picture(m.target.decode(y_0, x)[0])
    own = {"dtype": torch.float32}
    assert np.array_equal(array(upscale(picture, m, seed=7, **own)), array(expected))
    assert not np.array_equal(array(upscale(picture, m, seed=8, **own)), array(expected))


@pytest.mark.parametrize("fast", [True, False])
def test_the_dtype_is_what_the_device_is_fast_in(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast, raising=False)
    picture, m = blobs(11, 9), model()
    expected = upscale(picture, m, dtype=torch.bfloat16 if fast else torch.float32)
    other = upscale(picture, m, dtype=torch.float32 if fast else torch.bfloat16)
    assert np.array_equal(array(upscale(picture, m)), array(expected))
    assert 0 < np.abs(array(expected).astype(float) - array(other)).mean() < 1
    m.unet.to(torch.float16)  # the weights' own, where they have one
    assert Upscaler(m).tiled.network.dtype is None
    assert device.fast_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_the_dtype_on_a_gpu(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.fast_dtype(torch.device("cuda", 1)) == fast


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode(mode):
    source = blobs(12, 10)
    if mode in ("LA", "RGBA"):
        source.putalpha(blobs(12, 10, 1, seed=1))
    if mode == "I;16":
        source = Image.fromarray((array(blobs(12, 10, 1)) * 256 + 77).astype(np.uint16))
    source = source.convert(mode)
    result = upscale(source, model(), steps=2)
    kept = {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)
    assert result.mode == kept and result.size == (48, 40)
    if "A" in kept:
        alpha = source.getchannel("A").resize((48, 40), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(result.getchannel("A")), np.asarray(alpha))
    if kept == "I;16":
        assert len(np.unique(np.asarray(result) & 255)) > 100
        plane = Image.fromarray(array(source).astype(np.float32)).resize((48, 40), Image.Resampling.BICUBIC)
        assert np.abs(array(result) - array(plane)).mean() < 65535 / 8


def test_a_gray_picture_through_a_gray_network():
    result = upscale(blobs(8, 8, 1), model(channels=1))
    assert result.mode == "L" and result.size == (32, 32)
    with pytest.raises(image.ImageError, match="network of 1 channels cannot take a picture of 3"):
        upscale(blobs(8, 8), model(channels=1))


def test_icc_profile_is_kept():
    picture = blobs(8, 8)
    picture.info["icc_profile"] = b"a profile"
    assert upscale(picture, model()).info["icc_profile"] == b"a profile"


def test_a_bright_picture_is_no_cause_for_a_warning(recwarn):
    upscale(Image.fromarray(np.asarray(blobs(8, 8)) // 4 + 180), model())
    assert not recwarn.list


def test_exif_orientation_of_a_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    blobs(12, 8).save(tmp_path / "turned.png", exif=exif)
    assert upscale(tmp_path / "turned.png", model()).size == (32, 48)


def test_a_picture_in_memory():
    """Arrays and open files give what Pillow's image gives; whatever else is refused by name."""
    picture, m = blobs(9, 7), model()
    expected = array(upscale(picture, m))
    assert np.array_equal(array(upscale(np.asarray(picture), m)), expected)
    gray, clear = picture.convert("L"), picture.copy()
    clear.putalpha(gray)
    assert upscale(np.asarray(gray), m).mode == "L" and upscale(np.asarray(clear), m).mode == "RGBA"
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, "png", exif=exif)
    file.seek(0)
    turned = picture.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(array(upscale(file, m)), array(upscale(turned, m)))
    for broken, rule in ((b"no picture", "not an image that Pillow"), (file.getvalue()[:200], "cut short or broken")):
        with pytest.raises(image.ImageError, match=rule):
            upscale(io.BytesIO(broken), m)
    for other, got in (
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]"),
        (torch.zeros(3, 8, 8), "Tensor"),
        ([picture], "list"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=r"a picture is Pillow's image, a path, .* got " + got):
            upscale(other, m)
    with pytest.raises(FileNotFoundError):
        upscale("missing.png", m)


def test_a_seed_of_none_is_drawn_and_reported(caplog):
    upscaler, picture = Upscaler(model()), blobs(8, 8)
    with caplog.at_level(logging.INFO, "sr3fast"):
        spread = upscaler(picture, None, samples=2)
    seed = upscaler.last_seed
    assert caplog.text.count(f"seed=None drew the seed {seed}") == 1
    assert [array(p).tolist() for p in spread.pictures] == [array(upscaler(picture, seed + i)).tolist() for i in (0, 1)]
    for other in ([1, 2], 1.5, "7", True):
        with pytest.raises(TypeError, match=r"seed must be a whole number, or None .*\(samples= draws several\): got"):
            upscaler(picture, other)


def test_what_is_no_model(tmp_path):
    picture = blobs(8, 8)
    for other, got in ((unet(), "UNet"), (42, "int"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"name of weights that ship, .*weights\.Model.*: got {got}"):
            upscale(picture, other)
    (tmp_path / "I1_gen.pth").touch()
    with pytest.raises(ValueError, match=r"I1_gen.pth is a file: .* compat.janspiry.model\('.*pth', scale=4\)"):
        upscale(picture, tmp_path / "I1_gen.pth")
    with pytest.raises(FileNotFoundError, match="no weights at 'nowhere'"):
        upscale(picture, "nowhere")
    for name in ("cuda:77", "cpux"):
        with pytest.raises(ValueError, match=f"device {name} is not there"):
            upscale(picture, model(), device=name)


def test_a_result_that_is_not_finite_is_no_picture(recwarn):
    m = model()
    with torch.no_grad():
        m.unet.conv_out.bias[1] = math.nan
    with pytest.raises(image.ImageError, match="the result is not finite"):
        upscale(blobs(8, 8), m)
    assert not recwarn.list


def test_consistency_adds_what_the_source_lacks():
    """y_0 + up(source - down(y_0)): the result's mean is the source's, and it shrinks to something nearer."""
    picture = blobs(14, 11)
    m = model()

    def error(result):
        small = array(result.resize(picture.size, Image.Resampling.BICUBIC))
        return np.abs(small - array(picture)).mean()

    loose, tight = (upscale(picture, m, consistency=c, dtype=torch.float32) for c in (False, True))
    assert error(tight) < 0.7 * error(loose)
    source, x = image.to_tensor(picture)[None], image.to_tensor(image.bicubic(picture, (56, 44)))[None]
    y_0 = m.target.decode(Sampler(m.unet, SCHEDULE, steps=3)(x), x)
    expected = y_0 + image.resize(source - image.resize(y_0, (11, 14)), (44, 56))
    assert np.array_equal(array(tight), array(image.to_picture(expected[0])))


def test_samples_are_the_pictures_of_their_seeds():
    picture = blobs(9, 8)
    spread = upscale(picture, model(), seed=4, samples=3)
    assert isinstance(spread, Spread)
    each = [upscale(picture, model(), seed=4 + i) for i in range(3)]
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(spread.pictures, each, strict=True))
    stack = np.stack([array(p) for p in each])
    assert spread.std.shape == (3, 32, 36)
    inside = (stack > 0).all(0) & (stack < 255).all(0)  # 8 bits clamp
    std = stack.std(0, ddof=1).transpose(2, 0, 1) / 127.5
    assert np.abs(std - spread.std.numpy())[inside.transpose(2, 0, 1)].max() < 2 / 127.5
    assert np.abs(array(spread.mean) - stack.mean(0))[inside].max() <= 1.01
    with pytest.raises(ValueError, match="samples"):
        upscale(picture, model(), samples=1)


def test_scale_and_card():
    assert upscale(blobs(8, 8), model(scale=None), scale=2).size == (16, 16)
    assert upscale(blobs(8, 8), model(card={"steps": 2, "scales": [2, 4]}), scale=2).size == (16, 16)
    with pytest.raises(ValueError, match="these weights enlarge 4 times: got scale 3"):
        upscale(blobs(8, 8), model(), scale=3)
    with pytest.raises(ValueError, match="give the scale"):
        upscale(blobs(8, 8), model(scale=None))
    assert len(Upscaler(model()).sampler.table) == 3
    assert len(Upscaler(model(), steps=5).sampler.table) == 5
    assert len(Upscaler(model(card={})).sampler.table) == 25


def test_an_opened_picture_is_turned_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    blobs(6, 4).save(tmp_path / "turned.jpg", exif=exif)
    net = model()
    of_file = upscale(tmp_path / "turned.jpg", net, steps=1)
    with Image.open(tmp_path / "turned.jpg") as opened:
        of_picture = upscale(opened, net, steps=1)
        assert opened.size == (6, 4)  # the caller's is as it was
    assert of_file.size == (16, 24) and of_picture.tobytes() == of_file.tobytes()


def test_the_default_dtype_is_the_callers():
    net, source = model(), blobs(5, 4)
    expected = upscale(source, net, steps=2, dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        assert upscale(source, net, steps=2, dtype=torch.float32).tobytes() == expected.tobytes()
        assert upscale(blobs(24, 20), net, steps=1, dtype=torch.float32, tile=64).size == (96, 80)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_cannot_be_done_is_refused_before_any_step(tmp_path):
    net = model()
    calls = []
    net.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(image.ImageError, match=r"^a picture needs at least a pixel: got 0 x 3"):
        upscale(Image.new("RGB", (0, 3)), net)
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    with pytest.raises(image.ImageError, match=f"^{tmp_path / 'float.tiff'}: a picture of mode F has no fixed range"):
        upscale(tmp_path / "float.tiff", net)
    with pytest.raises(image.ImageError, match="4 times 5000 x 4000: 20000 x 16000 is 320 million pixels"):
        Upscaler(net).check((5000, 4000))
    with pytest.raises(ValueError, match="1 or 3 channels from as many"):
        Upscaler(replace(net, unet=unet(in_channels=4, out_channels=3)))
    with pytest.raises(ValueError, match="steps"):
        upscale(blobs(8, 8), net, steps=0)
    assert not calls


# Trace


def test_trace_goes_from_noise_to_the_result(tmp_path):
    trace = Trace(frames=4)
    result = upscale(blobs(13, 9), model(), steps=10, trace=trace)
    assert [p.size for p in trace.pictures] == [(52, 36)] * 4
    assert np.array_equal(array(trace.pictures[-1]), array(result))
    distance = [np.abs(array(p) - array(result)).mean() for p in trace.pictures]
    assert distance == sorted(distance, reverse=True) and distance[0] > 5
    strip = trace.strip(gap=4)
    assert strip.size == (4 * 52 + 3 * 4, 36)
    assert np.array_equal(array(strip)[:, -52:], array(result))
    trace.save(tmp_path / "strip.png")
    assert np.array_equal(array(Image.open(tmp_path / "strip.png")), array(strip))
    for suffix in ("gif", "webp"):
        trace.save(tmp_path / f"process.{suffix}")
        assert Image.open(tmp_path / f"process.{suffix}").n_frames == 4


def test_trace_begins_with_the_noise_and_ends_with_the_consistent_result():
    trace, net = Trace(frames=3), model(target=Target())
    result = upscale(blobs(8, 8), net, seed=7, trace=trace, consistency=True)
    assert np.array_equal(array(trace.pictures[-1]), array(result))
    pure = image.to_picture(ops.noise((1, 3, 32, 32), 7, domain=noise.Y_T)[0])
    assert np.array_equal(array(trace.pictures[0]), array(pure))
    assert np.array_equal(array(upscale(blobs(8, 8), net, seed=7, consistency=True)), array(result)), "without a trace"


@pytest.mark.parametrize("scale", [0, -2, 0.5, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused_where_the_weights_say_none(scale):
    with pytest.raises(ValueError, match="scale must be at least 1: got"):
        Upscaler(model(scale=None), scale=scale)


def test_trace_shrinks_long_frames():
    trace = Trace(frames=2, side=20)
    upscale(blobs(16, 8), model(), trace=trace)
    assert trace.pictures[0].size == (20, 10)
    assert math.isclose(20 / 10, 16 / 8)


def test_progress_bar_counts_the_steps(capsys):
    upscale(blobs(4, 4), model(), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_list_of_levels_has_its_own_length():
    grid = [1e-3, 0.1, 0.5, 0.9]
    upscaler = Upscaler(model(), grid=grid)
    assert len(upscaler.sampler.table) == 4 and len(Upscaler(model(), solver="ddim").sampler.table) == 3
    with pytest.raises(ValueError, match="steps must be the number of levels of the grid: got 5 and 4"):
        Upscaler(model(), grid=grid, steps=5)


def test_windows_of_an_unconditional_network():
    net = unet(in_channels=3)
    y_T = torch.randn(1, 3, 32, 40)
    whole, tiled = (Sampler(Tiled(net, tile), SCHEDULE, steps=2)(None, shape=y_T.shape, y_T=y_T) for tile in (0, 32))
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_windows_have_one_level_for_a_batch():
    net = unet()
    x, y = torch.zeros(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="share one level"):
        Tiled(net, 32)(x, y, torch.tensor([[0.2], [0.9]]))
    level = torch.full((2, 1), 0.5)
    assert torch.allclose(Tiled(net, 32)(x, y, level), net(x, y, level), atol=1e-5)
