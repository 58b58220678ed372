"""Whole folders against the truth: what belongs together, what is cut, what is refused, what is passed over."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sr3fast
from sr3fast import evaluation, image, metrics
from sr3fast.bound import variational_bound
from sr3fast.evaluation import BICUBIC, RESULT, evaluate, pictures
from sr3fast.schedule import Schedule
from sr3fast.unet import UNet
from sr3fast.upscaling import Upscaler, upscale
from sr3fast.weights import Model, Target


def picture(path, size=(66, 70), seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = image.resize(0.7 * torch.randn(3, 5, 5, generator=generator), (size[1], size[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    made = image.to_picture(values.clamp(-1, 1))
    made.save(path)
    return made


@pytest.fixture(scope="module")
def upscaler():
    torch.manual_seed(0)
    unet = UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(), groups=4, dropout=0.0, image_size=16).eval()
    schedule = Schedule.named("linear", T=50, start=1e-4, end=0.2)
    return Upscaler(Model(unet, schedule, Target("residual", 4.0), scale=4), steps=2)


def test_the_numbers_are_those_of_metrics(tmp_path, upscaler):
    truth = picture(tmp_path / "hr" / "a.png").crop((0, 0, 64, 68))
    small = image.bicubic(truth, (16, 17))
    made = upscale(small, upscaler.model, steps=2, seed=3)
    found = sr3fast.evaluate(tmp_path / "hr", upscaler, seed=3)
    y, y_0, x = (image.to_tensor(p)[None] for p in (made, truth, small))
    scores = found.scores["a"][RESULT]
    assert scores.psnr == metrics.psnr(y, y_0).item() and scores.ssim == metrics.ssim(y, y_0).item()
    assert scores.consistency == metrics.consistency(y, x).item() * 1e5
    assert scores.spectrum == metrics.spectral_distance(y, y_0).item()
    bicubic = image.to_tensor(image.bicubic(small, (64, 68)))[None]
    assert found.scores["a"][BICUBIC].psnr == metrics.psnr(bicubic, y_0).item()
    assert found.bits is None and not found.failed


def test_mean_table_and_json(tmp_path):
    for i, name in enumerate(("a", "mean")):
        truth = picture(tmp_path / "hr" / f"{name}.png", seed=i)
        picture(tmp_path / "sr" / f"{name}.png", truth.size, seed=i + 2)
    found = evaluate(tmp_path / "hr", result=tmp_path / "sr", scale=4)
    a, b = (found.scores[name][RESULT] for name in ("a", "mean"))
    assert found.mean[RESULT] == pytest.approx(np.mean([a, b], 0))
    lines = [line.split() for line in str(found).splitlines()[1:]]
    assert [line[:2] for line in lines] == [[n, w] for n in ("a", "mean", "mean") for w in (BICUBIC, RESULT)]
    assert [float(n) for n in lines[1][2:]] == pytest.approx(a, abs=5e-3)
    tree = json.loads(json.dumps(found.as_dict()))
    assert (
        tree["pictures"]["mean"][RESULT]["psnr"] == b.psnr and tree["mean"][RESULT]["ssim"] == found.mean[RESULT].ssim
    )


def test_a_result_has_the_truths_size(tmp_path):
    """As it is in its file, or cut to a multiple of the scale; the cut is the same for both."""
    truth = picture(tmp_path / "hr" / "a.png", (66, 70))
    made = picture(tmp_path / "sr" / "whole.png", (66, 70), seed=1)
    made.crop((0, 0, 64, 68)).save(tmp_path / "sr" / "cut.png")
    whole, cut = (
        evaluate(tmp_path / "hr" / "a.png", result=tmp_path / "sr" / f"{n}.png", scale=4).scores
        for n in ("whole", "cut")
    )
    assert whole == cut
    for size in ((192, 128), (65, 70), (64, 67)):
        picture(tmp_path / "sr" / "a.png", size)
        failed = evaluate(tmp_path / "hr" / "a.png", result=tmp_path / "sr" / "a.png", scale=4).failed
        (error,) = failed.values()
        assert "a result must have the truth's size, 66 x 70, cut to 64 x 68: got {} x {}".format(*size) in str(error)
    image.bicubic(truth, (15, 17)).save(tmp_path / "lr.png")
    failed = evaluate(
        tmp_path / "hr" / "a.png", source=tmp_path / "lr.png", result=tmp_path / "hr" / "a.png", scale=4
    ).failed
    assert "15 x 17, 4 times larger, is not the size of" in str(*failed.values())


def test_names_in_folders(tmp_path):
    """Subfolders are taken; a name that two files share keeps its suffix, as `upscale` writes them."""
    for i, name in enumerate(("a.png", "a.jpg", "deep/a.png", "deep/b.bmp", ".hidden.png")):
        picture(tmp_path / "hr" / name, seed=i)
    assert list(pictures(tmp_path / "hr")) == ["a.jpg", "a.png", "deep/a", "deep/b"]
    for name, path in pictures(tmp_path / "hr").items():
        (tmp_path / "sr" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(tmp_path / "sr" / f"{name}.png")
    found = evaluate(tmp_path / "hr", result=tmp_path / "sr", scale=4)
    assert [s[RESULT].psnr for s in found.scores.values()] == [float("inf")] * 4
    assert found.as_dict()["mean"][RESULT]["psnr"] is None
    json.dumps(found.as_dict(), allow_nan=False)
    (tmp_path / "sr" / "a.jpg.png").unlink()
    found = evaluate(tmp_path / "hr", result=tmp_path / "sr", scale=4)
    assert list(found.scores) == ["a.png", "deep/a", "deep/b"]
    truth = tmp_path / "hr" / "a.jpg"
    assert str(found.failed.pop(truth)) == f"{truth}: no picture named a.jpg in {tmp_path / 'sr'}"
    assert not found.failed
    found = evaluate(tmp_path / "hr", result=tmp_path / "sr", scale=4, limit=1)
    assert not found.scores and list(found.failed) == [truth]
    with pytest.raises(ValueError, match="no picture here has the name"):  # one of several is not its partner by that
        evaluate(tmp_path / "hr", result=tmp_path / "hr" / "deep" / "b.bmp", scale=4, limit=1)
    picture(tmp_path / "other" / "x.png")
    for options in ({"result": tmp_path / "other"}, {"result": tmp_path / "sr", "source": tmp_path / "other"}):
        with pytest.raises(ValueError, match=r"other: no picture here has the name of a truth, such as a\.jpg"):
            evaluate(tmp_path / "hr", scale=4, **options)


def test_a_folder_holds_other_things_than_pictures(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("report.pdf", "data.h5", "film.mpg", "drawing.eps", "notes.txt"):
        (tmp_path / name).write_bytes(b"no picture")
    assert list(pictures(tmp_path)) == ["a"]
    assert not evaluate(tmp_path, result=tmp_path, scale=4).failed


def test_a_truth_is_cut_as_training_cuts_it(tmp_path):
    """66 / 1.1 is 59.99999999999999: a source of 60, and nothing is cut."""
    picture(tmp_path / "a.png", (66, 66))
    picture(tmp_path / "b.png", (65, 65))
    (error,) = evaluate(tmp_path / "a.png", result=tmp_path / "b.png", scale=1.1).failed.values()
    assert "the truth's size, 66 x 66: got 65 x 65" in str(error)


def test_a_broken_picture_is_passed_over(tmp_path, upscaler):
    for i, name in enumerate(("a.png", "c.png")):
        picture(tmp_path / name, seed=i)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    picture(tmp_path / "tiny.png", (3, 9))
    found = evaluate(tmp_path, upscaler)
    assert list(found.scores) == ["a", "c"]
    assert {path.name: str(error).split(": ")[1] for path, error in found.failed.items()} == {
        "b.png": "not an image that Pillow can read",
        "tiny.png": "3 x 9 is too small to be a truth",
    }
    assert found.mean[BICUBIC].psnr == pytest.approx(np.mean([s[BICUBIC].psnr for s in found.scores.values()]))


def test_small_pictures_have_no_spectrum(tmp_path):
    for i, size in enumerate(((64, 64), (64, 60), (8, 64))):
        picture(tmp_path / f"{i}.png", size, seed=i)
    found = evaluate(tmp_path, result=tmp_path, scale=4)
    assert [(s[BICUBIC].ssim is None, s[BICUBIC].spectrum is None) for s in found.scores.values()] == [
        (False, False),
        (False, True),
        (True, True),
    ]
    assert found.mean[BICUBIC].spectrum == found.scores["0"][BICUBIC].spectrum
    table = str(found)
    assert "nan" not in table and "-: SSIM needs sides of 11 pixels, the spectrum of 64" in table
    assert "SSIM needs" not in str(evaluate(tmp_path / "0.png", result=tmp_path / "0.png", scale=4))


def test_refusals(tmp_path, upscaler):
    picture(tmp_path / "hr" / "a.png")
    (tmp_path / "empty").mkdir()
    hr = tmp_path / "hr"
    for arguments, options, message in (
        ((hr, upscaler), {"limit": 0}, "limit must be at least 1: got 0"),
        ((tmp_path / "empty", upscaler), {}, "empty: no pictures in this folder"),
        ((tmp_path / "absent", upscaler), {}, "absent: no such file or folder"),
        ((hr,), {"result": hr, "bits": 3}, "bits needs an upscaler"),
        ((hr, upscaler), {"bits": 3}, "bits needs weights whose target is the image"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(*arguments, **options)
    image_model = Model(upscaler.model.unet, upscaler.model.schedule, scale=4)
    with pytest.raises(ValueError, match=r"bits must lie in 2\.\.T = 50: got 51"):
        evaluate(hr, Upscaler(image_model, steps=2), bits=51)


def test_limit(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    assert list(evaluate(tmp_path, result=tmp_path, scale=4, limit=2).scores) == ["0", "1"]


def test_a_source_made_here_is_one_that_a_file_holds(tmp_path, upscaler):
    """Bicubic in float overshoots; the same picture from a file gives the same numbers."""
    values = torch.zeros(1, 96, 96)
    values[:, 40:60, 40:60] = 1
    image.to_picture(values * 2 - 1, 65535).save(tmp_path / "truth.png")
    made = evaluate(tmp_path / "truth.png", upscaler).scores
    small = image.Photo.read(tmp_path / "truth.png").resized((24, 24))
    assert small.tensor().abs().max() > 1
    small.with_color(small.tensor()).save(tmp_path / "small.png")
    assert evaluate(tmp_path / "truth.png", upscaler, source=tmp_path / "small.png").scores == made


def test_finished_pictures_need_the_scale(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="finished pictures need scale, how much they were enlarged, or source"):
        evaluate(tmp_path, result=tmp_path)
    for scale in (0.5, float("nan")):
        with pytest.raises(ValueError, match=f"scale must be at least 1: got {scale}"):
            evaluate(tmp_path, result=tmp_path, scale=scale)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no truth and its source can be read, the source the smaller: give scale"):
        evaluate(tmp_path / "a.png", source=tmp_path / "small" / "a.png", result=tmp_path / "a.png")


def test_the_scale_of_finished_pictures_is_told_from_their_sources(tmp_path):
    for folder, size in (("truth", (66, 65)), ("small", (16, 16)), ("made", (66, 65))):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "b.png", size=size)
    for folder in ("truth", "small", "made"):
        (tmp_path / folder / "a.png").write_bytes(b"broken")
    found = evaluate(tmp_path / "truth", source=tmp_path / "small", result=tmp_path / "made")
    assert list(found.failed) == [tmp_path / "truth" / "a.png"]
    told = evaluate(tmp_path / "truth", source=tmp_path / "small", result=tmp_path / "made", scale=4)
    assert found.scores == told.scores and "b" in found.scores


def test_bits_are_of_what_the_network_takes_as_it_is(tmp_path, upscaler, monkeypatch):
    """Nothing padded counts: sides that are no multiple of the network's are cut."""
    seen = []

    def noted(f_theta, x, y_0, *args, **options):
        seen.append((x, y_0))
        return variational_bound(f_theta, x, y_0, *args, **options)

    monkeypatch.setattr(evaluation, "variational_bound", noted)
    truth = picture(tmp_path / "truth.png", size=(33, 21))
    model = Model(upscaler.model.unet, upscaler.model.schedule, scale=3)
    assert evaluate(tmp_path / "truth.png", Upscaler(model, steps=2), bits=2).bits > 0
    ((x, y_0),) = seen
    bicubic = image.bicubic(image.bicubic(truth, (11, 7)), truth.size)
    for values, whole in ((y_0, truth), (x, bicubic)):
        assert torch.equal(values[0], image.to_tensor(whole)[:, :20, :32])


def test_the_mean_of_samples_is_a_result(tmp_path):
    for i, name in enumerate(("hr/a", "hr/b", "hr/b-mean", "sr/a-mean", "sr/a-1", "sr/b-mean")):
        picture(tmp_path / f"{name}.png", seed=i)
    found = evaluate(tmp_path / "hr", result=tmp_path / "sr", scale=4)
    assert list(found.scores) == ["a", "b-mean"] and list(found.failed) == [tmp_path / "hr" / "b.png"]


def test_bits_are_of_256_levels(tmp_path, upscaler):
    values = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image.to_picture(values, 65535).save(tmp_path / "truth.png")
    model = Model(upscaler.model.unet, upscaler.model.schedule, scale=4)
    found = evaluate(tmp_path / "truth.png", Upscaler(model, steps=2), bits=2)
    assert "256 levels: this one has 16 bits" in str(found.failed[tmp_path / "truth.png"]) and found.bits is None


def test_what_enlarges_may_be_a_model_or_nothing(tmp_path, upscaler):
    picture(tmp_path / "a.png", size=(16, 16))
    model = upscaler.model
    model.card = {"steps": 2}
    assert evaluate(tmp_path, model).scores == evaluate(tmp_path, upscaler).scores
    assert evaluate(tmp_path).scores == evaluate(tmp_path, "photo-x4").scores != evaluate(tmp_path, model).scores


def test_a_truth_that_is_cut_beside_its_source_is_told(tmp_path, upscaler):
    picture(tmp_path / "truth.png", size=(67, 66))
    picture(tmp_path / "small.png", size=(16, 16))
    with pytest.warns(UserWarning, match="no 4 times its source is cut at the right and below"):
        evaluate(tmp_path / "truth.png", upscaler, source=tmp_path / "small.png")
