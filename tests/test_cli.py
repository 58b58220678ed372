"""The command line: files, folders, patterns, reruns; and bad input, which is one line and exit code 2."""

import errno
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import janspiry_reference
import numpy as np
import pytest
import torch
from PIL import Image

from sr3fast import image, metrics, training, weights
from sr3fast.__main__ import Upscale, main
from sr3fast.bound import variational_bound
from sr3fast.compat import janspiry
from sr3fast.jobs import plan
from sr3fast.schedule import Schedule
from sr3fast.unet import UNet
from sr3fast.upscaling import upscale

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random network, saved."""
    torch.manual_seed(0)
    unet = UNet(channels=8, multipliers=(1, 1, 1, 2), blocks=1, attention=(), groups=4, dropout=0.0, image_size=16)
    schedule = Schedule.named("linear", T=200, start=1e-4, end=5e-2)
    target = weights.Target("residual", 4.0)
    path = tmp_path_factory.mktemp("weights")
    weights.save(path, weights.Model(unet, schedule, target, scale=4, card={"steps": STEPS}))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path, size=(8, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = image.resize(0.7 * torch.randn(3, 3, 3, generator=generator), (size[1], size[0]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.to_picture(values.clamp(-1, 1)).save(path)
    return Path(path)


def run(folder, *arguments, command="upscale"):
    return main([command, *map(str, arguments), "--weights", str(folder), "--device", "cpu"])


def files(path):
    return sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file())


# upscale


@pytest.fixture
def terminal(monkeypatch):
    """Bars are for terminals."""
    monkeypatch.setattr("sr3fast.__main__._on_a_terminal", lambda: True)


def test_a_file(here, folder, capsys, terminal):
    picture("photo.jpg")
    assert run(folder, "photo.jpg") == 0
    assert files(here) == ["photo-x4.png", "photo.jpg"]
    assert Image.open("photo-x4.png").size == (32, 24)
    output = capsys.readouterr()
    assert "photo-x4.png" in output.out and f"{STEPS}/{STEPS}" in output.err


def test_off_a_terminal_there_are_no_bars(here, folder, capsys):
    picture("a.jpg")
    picture("b.jpg")
    assert run(folder, "a.jpg", "b.jpg") == 0
    output = capsys.readouterr()
    assert "a-x4.png" in output.out and not output.err


def test_seed_steps_solver_and_grid_reach_the_sampler(here, folder):
    picture("photo.png")
    expected = {}
    for name, options, arguments in (
        ("a", {"seed": 1}, ["--seed", "1"]),
        ("b", {"seed": 1, "steps": 5}, ["--seed", "1", "--steps", "5"]),
        ("c", {"solver": "ddim", "grid": "t"}, ["--solver", "ddim", "--grid", "t"]),
        ("d", {"consistency": True}, ["--consistency"]),
        ("e", {"consistency": False}, ["--no-consistency"]),
    ):
        assert run(folder, "photo.png", "--out", f"{name}.png", *arguments) == 0
        expected[name] = np.asarray(upscale("photo.png", weights.load(folder), **options))
        assert np.array_equal(np.asarray(Image.open(f"{name}.png")), expected[name])
    assert len({value.tobytes() for value in expected.values()}) == 5


def test_weights_that_ask_for_consistency(here, folder, capsys):
    picture("photo.png")
    model = weights.load(folder)
    weights.save("asking", replace(model, card={**model.card, "consistency": True}))
    made = {}
    for name, weight, arguments in (
        ("loose", folder, ()),
        ("asked", "asking", ()),
        ("told", folder, ["--consistency"]),
        ("left", "asking", ["--no-consistency"]),
    ):
        assert run(weight, "photo.png", "--out", f"{name}.png", *arguments) == 0
        made[name] = Path(f"{name}.png").read_bytes()
    assert made["asked"] == made["told"] != made["left"] == made["loose"]
    refused(here, folder, capsys, "photo.png", "--consistency", "--no-consistency", match="not both")


def test_a_folder_and_a_rerun(here, folder, capsys, terminal):
    for i, name in enumerate(("a.png", "deep/b.jpg", "c.png")):
        picture(here / "in" / name, seed=i)
    (here / "in" / "notes.txt").write_text("no picture")
    assert run(folder, "in") == 0
    assert files(here / "in-x4") == ["a.png", "c.png", "deep/b.png"]
    assert "3/3" in capsys.readouterr().err
    Path("in-x4/a.png").unlink()
    before = {name: (os.stat(f"in-x4/{name}").st_mtime_ns) for name in ("c.png", "deep/b.png")}
    assert run(folder, "in") == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert {name: (os.stat(f"in-x4/{name}").st_mtime_ns) for name in before} == before
    assert Path("in-x4/a.png").exists()
    assert run(folder, "in", "--overwrite") == 0
    assert os.stat("in-x4/c.png").st_mtime_ns != before["c.png"]


def test_a_pattern_does_not_take_its_own_results(here, folder):
    for i in range(2):
        picture(f"{i}.png", seed=i)
    assert run(folder, "*.png") == 0
    assert run(folder, "*.png") == 0
    assert files(here) == ["0-x4.png", "0.png", "1-x4.png", "1.png"]


def test_plan(here):
    picture("in/a.jpg")
    picture("in/a.png")
    picture("b.png")
    assert plan(["in"], Path("out"), "-x4") == [
        (Path("in/a.jpg"), Path("out/a.jpg.png")),
        (Path("in/a.png"), Path("out/a.png.png")),
    ]
    assert plan(["b.png"], None, "-x4") == [(Path("b.png"), Path("b-x4.png"))]
    assert plan(["b.png"], Path("c.webp"), "-x4") == [(Path("b.png"), Path("c.webp"))]
    assert plan(["b.png", "in/*.jpg"], Path("out"), "-x4") == [
        (Path("b.png"), Path("out/b.png")),
        (Path("in/a.jpg"), Path("out/a.png")),
    ]
    with pytest.raises(ValueError, match="one file for 2 pictures: give a folder"):
        plan(["in"], Path("c.png"), "-x4")
    with pytest.raises(ValueError, match="no such file or folder"):
        plan(["missing.png"], None, "-x4")
    with pytest.raises(ValueError, match="nothing to enlarge"):
        plan([], None, "-x4")
    picture("in2/a.jpg")
    with pytest.raises(ValueError, match="nothing to enlarge"):
        plan([""], None, "-x4")


def test_plan_writes_no_file_over_another(here):
    for name in ("in/a.jpg", "in/a.png", "in2/a.jpg", "in3/b.png", "a.png", "a-trace.png"):
        picture(name)

    def over(*inputs, out=None, **options):
        options = Upscale(inputs=inputs, **options)
        with pytest.raises(ValueError, match=r"would be written for .*: run them apart, or give another --out"):
            plan(inputs, out and Path(out), "-x4", options.written)

    over("in/a.jpg", "in2/a.jpg", out="out")
    over("in2", "in2/../in/a.jpg", out="out")
    over("in/a.png", "a.png", out=".")  # a.png is a source
    over("a.png", out=".")
    over("a.png", out="a.png")
    over("in2", "in3", out="in3")
    over("a.png", "a-trace.png", out="out", trace="png")
    assert plan(["in/a.jpg", str(here / "in/a.jpg")], Path("out"), "-x4") == [(Path("in/a.jpg"), Path("out/a.png"))]
    expected = [(Path("in/a.jpg"), Path("out/a.jpg.png")), (Path("in/a.png"), Path("out/a.png.png"))]
    assert plan(["in/a.jpg", "in/a.png"], Path("out"), "-x4") == expected  # as a pattern, or the shell's
    assert plan(["in/*"], Path("out"), "-x4") == expected
    os.symlink("a.png", "link.png")
    assert len(plan(["*.png"], None, "-x4")) == 3


def test_what_an_earlier_run_made_is_no_source(here):
    for name in ("a.png", "a-x4.png", "a-x4-1.png", "out/a.png"):
        picture(name)
    options = Upscale(inputs=(), samples=2)
    a = (Path("a.png"), Path("a-x4.png"))
    with pytest.warns(UserWarning, match=r"left out, as made by an earlier run: a-x4-1\.png and 1 more$"):
        assert plan(["a.png", "a-x4.png", "a-x4-1.png"], None, "-x4") == [a]
    picture("a-x4-mean.png")
    Path("a-x4.png").unlink()
    assert plan(["*.png"], None, "-x4", options.written) == [a]
    assert plan(["**/*.png"], Path("out"), "-x4")[0] == (Path("a-x4-1.png"), Path("out/a-x4-1.png"))
    with pytest.raises(ValueError, match=r"out/a\.png would be written for out/a\.png"):
        plan(["out/*.png"], Path("out"), "-x4")
    for name in ("1", "12", "std", "trace"):  # whatever options they were made with
        picture(f"a-x4-{name}.png")
    picture("a-x4-trace.gif")
    picture("a-1.png")
    for inputs in (["*.png", "*.gif"], ["."]):
        assert {source.name for source, _ in plan(inputs, None, "-x4") if source.parent == Path(".")} == {
            "a.png",
            "a-1.png",
        }
    Path("empty/folder").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"nothing to enlarge: empty/\* has no pictures"):
        plan(["empty/*"], None, "-x4")


def test_a_broken_file_is_passed_over(here, folder, capsys):
    picture("in/a.png")
    (here / "in" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    picture("in/c.png", seed=1)
    assert run(folder, "in") == 2
    assert files(here / "in-x4") == ["a.png", "c.png"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sr3fast:")]
    assert len(errors) == 2 and "in/b.png" in errors[0] and "1 of 3" in errors[1]


def test_samples_and_trace(here, folder):
    picture("photo.png")
    assert run(folder, "photo.png", "--samples", "2", "--trace", "gif", "--steps", "4") == 0
    made = ["photo-x4-1.png", "photo-x4-2.png", "photo-x4-mean.png", "photo-x4-std.png", "photo-x4-trace.gif"]
    assert files(here) == [*made, "photo.png"]
    one, two, mean = (np.asarray(Image.open(name)).astype(float) for name in made[:3])
    inside = (np.minimum(one, two) > 0) & (np.maximum(one, two) < 255)
    assert np.abs(mean - (one + two) / 2)[inside].max() <= 1.01
    assert Image.open("photo-x4-std.png").getextrema()[1] == 255
    assert Image.open("photo-x4-trace.gif").n_frames >= 4


def test_samples_that_are_drawn_are_kept(here, folder, monkeypatch):
    picture("a.png")
    write = image.write

    def interrupted(made, path, **options):
        write(made, path, **options)
        if path.name == "a-x4-2.png":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image, "write", interrupted)
        assert run(folder, "a.png", "--samples", "3") == 130
    assert files(here) == ["a-x4-1.png", "a-x4-2.png", "a.png"]
    first = Path("a-x4-1.png").read_bytes()
    assert run(folder, "a.png", "--samples", "3") == 0
    names = ["a-x4-1.png", "a-x4-2.png", "a-x4-3.png", "a-x4-mean.png", "a-x4-std.png", "a.png"]
    assert files(here) == names and Path("a-x4-1.png").read_bytes() == first


def test_a_strip(here, folder):
    picture("photo.png")
    assert run(folder, "photo.png", "--trace", "png", "--steps", "8") == 0
    assert Image.open("photo-x4-trace.png").size == (8 * 32 + 7 * 4, 24)


# The other commands


def test_every_picture_of_a_folder_has_a_name_of_its_own(here):
    for name in ("a.png", "a.jpg", "a.png.png", "b.png", "c.png.png", "c.png.jpg"):
        picture(f"in/{name}")
    expected = {"a.png": "a.png.png", "a.jpg": "a.jpg.png", "a.png.png": "a.png.png.png", "b.png": "b.png"}
    expected |= {"c.png.png": "c.png.png.png", "c.png.jpg": "c.png.jpg.png"}
    assert {source.name: result.name for source, result in plan(["in"], Path("out"), "-x4")} == expected


def test_what_earlier_runs_made_in_a_folder_is_no_source(here):
    for name in ("pics/s.jpg", "pics/s-x4.png", "pics/in/t.png", "pics/in/t-x4.png"):
        picture(name)
    expected = [(here / "pics-x4/in/t.png", Path("pics/in/t.png")), (here / "pics-x4/s.png", Path("pics/s.jpg"))]
    assert sorted((result, source) for source, result in plan(["pics"], None, "-x4")) == expected
    assert Path("pics/s-x4.png") in dict(plan(["pics"], Path("out"), "-x4"))  # with --out they are made elsewhere
    picture("many/h.jpg")
    again = [(Path("many/h.jpg"), Path("many/h.png"))]
    assert plan(["many"], Path("many"), "-x4") == again
    picture("trip/holiday.jpg")
    for name in ("holiday-1.png", "holiday.webp", "holiday.gif"):  # anybody's
        picture(f"trip/{name}")
        with (
            pytest.raises(ValueError, match=f"is trip/{name} or made of it") if name.endswith("png") else nullcontext()
        ):
            assert len(plan(["trip"], Path("trip"), "-x4")) == 2
        Path(f"trip/{name}").unlink()
    picture("many/h.png")
    assert [source for source, _ in plan(["many"], Path("many"), "-x4")] == [Path("many/h.jpg")]


def test_a_trace_that_is_not_made_is_told(here, folder, capsys):
    picture("a.png")
    assert run(folder, "a.png", "--out", "b.png") == 0
    capsys.readouterr()
    assert run(folder, "a.png", "--out", "b.png", "--trace", "png") == 0
    assert "b.png is there already, b-trace.png is not (--overwrite" in capsys.readouterr().out


def test_warnings_are_a_line(here, folder, capsys):
    picture("hr/a.png", (67, 66))
    picture("lr/a.png", (16, 16))
    assert run(folder, "hr", "--source", "lr", command="evaluate") == 0
    errors = capsys.readouterr().err
    assert "sr3fast: a truth that is no 4 times its source is cut" in errors and "UserWarning" not in errors


def test_evaluate_makes_the_sources(here, folder, capsys):
    for i in range(2):
        picture(f"hr/{i}.png", (66, 70), seed=i)
    assert run(folder, "hr", "--json", "scores.json", command="evaluate") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, who] for name in ("0", "1", "mean") for who in ("bicubic", "result")
    ]
    found = json.loads(Path("scores.json").read_text())
    scores = found["pictures"] | {"mean": found["mean"]}
    truth = Image.open("hr/0.png").crop((0, 0, 64, 68))
    bicubic = image.bicubic(image.bicubic(truth, (16, 17)), (64, 68))
    error = np.asarray(bicubic).astype(float) - np.asarray(truth).astype(float)
    assert scores["0"]["bicubic"]["psnr"] == pytest.approx(10 * np.log10(255**2 / (error**2).mean()))
    assert scores["mean"]["result"]["ssim"] == pytest.approx(
        (scores["0"]["result"]["ssim"] + scores["1"]["result"]["ssim"]) / 2
    )
    assert scores["0"]["result"] != scores["0"]["bicubic"]


def test_evaluate_finished_pictures_against_given_sources(here, folder):
    truth = Image.open(picture("hr/a.png", (64, 64)))
    image.bicubic(truth, (16, 16)).save(picture("lr/a.png"))
    truth.save(picture("sr/a.png"))
    options = ["hr", "--source", "lr", "--result", "sr", "--json", "scores.json"]
    assert run(folder, *options, command="evaluate") == 0
    result = json.loads(Path("scores.json").read_text())["pictures"]["a"]["result"]
    assert result["psnr"] is None and result["ssim"] == pytest.approx(1) and result["spectrum"] == 0
    picture("hr/b.png", (64, 64))
    assert run(folder, *options, command="evaluate") == 2


def test_evaluate_bits(here, folder, capsys):
    picture("hr/a.png", (66, 64))
    assert run(folder, "hr", "--bits", "3", command="evaluate") == 2
    assert "bits needs weights whose target is the image" in capsys.readouterr().err
    model = weights.load(folder)
    model.target = weights.Target("image")
    weights.save("images", model)
    options = ("hr", "--bits", "3", "--json", "scores.json")
    assert run("images", *options, command="evaluate") == 0
    truth = Image.open("hr/a.png").crop((0, 0, 64, 64))
    x = image.to_tensor(image.bicubic(image.bicubic(truth, (16, 16)), (64, 64)))[None]
    bound = variational_bound(model.unet, x, image.to_tensor(truth)[None], model.schedule, 0, steps=3)
    assert json.loads(Path("scores.json").read_text())["bits a dimension"] == pytest.approx(bound["bits"])


def test_evaluate_passes_over_what_is_broken(here, folder, capsys):
    truth = Image.open(picture("hr/a.png", (64, 64)))
    picture("hr/b.png", (48, 32), seed=1)
    (here / "hr" / "c.png").write_bytes(b"no picture")
    truth.save(picture("sr/a.png"))
    picture("sr/b.png", (192, 128))
    picture("sr/c.png")
    options = ("hr", "--result", "sr", "--scale", "4", "--json", "scores.json")
    assert run(folder, *options, command="evaluate") == 2
    output = capsys.readouterr()
    assert [line.split()[:2] for line in output.out.splitlines()[1:]] == [["a", "bicubic"], ["a", "result"]]
    assert [line for line in output.err.splitlines() if line.startswith("sr3fast: ")] == [
        "sr3fast: sr/b.png: a result must have the truth's size, 48 x 32: got 192 x 128",
        "sr3fast: hr/c.png: not an image that Pillow can read: convert it to PNG or JPEG",
        "sr3fast: 2 of 3 pictures could not be measured",
    ]
    assert list(json.loads(Path("scores.json").read_text())["failed"]) == ["hr/b.png", "hr/c.png"]
    assert run(folder, "hr", "--limit", "0", command="evaluate") == 2
    assert capsys.readouterr().err == "sr3fast: limit must be at least 1: got 0\n"


def test_evaluate_tells_the_scale_of_results_from_their_sources(here, folder, capsys):
    picture("hr/b.png", (67, 65))
    picture("hr/a.png", (64, 68), seed=1)  # the first in order: 3 times its source, and one pixel
    truths = {name: Image.open(f"hr/{name}.png") for name in ("a", "b")}
    for name, truth in truths.items():
        truth.save(picture(f"sr/{name}.png"))
        image.bicubic(truth, (truth.width // 3, truth.height // 3)).save(picture(f"lr/{name}.png"))
    Path("lr/broken.png").write_bytes(b"no picture")
    assert run(folder, "hr", "--result", "sr", command="evaluate") == 2
    assert capsys.readouterr().err.startswith("sr3fast: --result needs --scale, or --source")
    scores = []
    for given in (["--source", "lr"], ["--source", "lr", "--scale", "3"]):
        assert run(folder, "hr", "--result", "sr", *given, "--json", "scores.json", command="evaluate") == 0
        scores.append(json.loads(Path("scores.json").read_text()))
    assert scores[0] == scores[1] and len(scores[0]["pictures"]) == 2
    image.bicubic(truths["a"], (40, 40)).save(picture("half/hr.png"))
    image.bicubic(truths["a"], (16, 16)).save(picture("half/lr.png"))  # 2.5 times
    assert run(folder, "half/hr.png", "--result", "half/hr.png", "--source", "half/lr.png", command="evaluate") == 0


SMALL = ["--batch-size", "1", "--iterations", "1", "--warmup", "1", "--validation-steps", "1", "--device", "cpu"]


def test_train_begins_with_weights_that_say_what_it_is(here, folder, capsys):
    """The scale and the structure are theirs; a flag that says another is refused, one that repeats them is not."""
    picture("in/a.png", (32, 32))
    begin = ["train", "--data", "in", "--crop", "16", *SMALL, "--init", str(folder)]
    for flag in (["--scale", "2"], ["--channels", "32"], ["--target", "image"], ["--level", "gamma"], ["--T", "2000"]):
        assert main([*begin, "--out", "refused", *flag]) == 2
        assert f"{flag[0][2:]} must be that of the weights" in capsys.readouterr().err
    assert not Path("refused").exists()
    assert main([*begin, "--out", "run", "--lr", "1e-12", "--channels", "8", "--scale", "4"]) == 0
    made, start = weights.load("run/model"), weights.load(folder)
    assert (made.scale, made.target, made.card) == (4, start.target, start.card)
    assert torch.allclose(made.unet.conv_in.weight, start.unet.conv_in.weight, atol=1e-6)
    assert main([*begin[:-2], "--iterations", "2", "--out", "run", "--lr", "1e-12", "--resume"]) == 0
    assert torch.load("run/checkpoint.pt", weights_only=True)["iteration"] == 2
    assert main([*begin, "--out", "run", "--resume"]) == 2
    assert "leave out start (--init), or resume" in capsys.readouterr().err
    assert main(["train", "--data", "in", "--out", "x", "--config", "sr_sr3_16_128", *SMALL]) == 2
    assert "--config is for a checkpoint of Janspiry's that --init names" in capsys.readouterr().err


def test_train_resumes_with_the_options_that_the_run_began_with(here, capsys):
    picture("in/a.png", (32, 32))
    options = ["--channels", "8", "--multipliers", "1", "2", "--blocks", "1", "--betas", "0.5", "0.9"]
    options += ["--dtype", "float32"]
    begin = ["train", "--data", "in", "--out", "run", "--crop", "16", *SMALL, *options]
    assert main(begin) == 0
    first = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    Path("run").rename("moved")
    assert main(["train", "--resume", "--out=moved", "--iterations", "3", "--workers", "1"]) == 0
    state = torch.load("moved/checkpoint.pt", weights_only=True)
    assert state["iteration"] == 3
    assert state["config"] == first | {"resume": True, "out": str(here / "moved"), "iterations": 3, "workers": 1}
    assert main([*begin[:4], "moved", *begin[5:], "--iterations", "3", "--resume"]) == 0  # all of them again
    capsys.readouterr()
    other = ["--batch-size", "2", "--p", "1", "--dtype", "bfloat16", "--lr", "1"]
    assert main(["train", "--out", "moved", "--resume", *other]) == 2
    told = "was trained with batch_size=1, not 2, p=2, not 1: give the same, as sr3fast.training.resumed has it"
    assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--out"])
    assert "__main__.py" not in capsys.readouterr().err
    assert main(["train", "--out", "none", "--resume"]) == 2
    assert "nothing to resume: none/checkpoint.pt does not exist" in capsys.readouterr().err


def test_train_begins_with_a_checkpoint_of_janspirys_code(here, capsys):
    torch.save(janspiry_reference.diffusion(T=50, end=0.3).state_dict(), "I1_E1_gen.pth")
    resolutions = {"train": {"l_resolution": 8, "r_resolution": 16}}
    Path("mine.json").write_text(json.dumps({"model": {"unet": {"norm_groups": 8}}, "datasets": resolutions}))
    picture("in/a.png", (32, 32))
    begin = ["train", "--data", "in", "--out", "run", "--crop", "16", *SMALL, "--init", "I1_E1_gen.pth"]
    assert main(begin) == 2
    assert "norm_groups cannot be read from a checkpoint" in capsys.readouterr().err
    assert main([*begin, "--config", "mine.json"]) == 0
    made = weights.load("run/model")
    assert made.scale == 2 and made.schedule.T == 50 and made.unet.config["groups"] == 8


def test_the_example_begins_with_the_weights_it_is_given(here, monkeypatch):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_photo_x4.py"))
    picture("run/pictures/a.png", (64, 64))
    started = []
    monkeypatch.setitem(example["main"].__globals__, "train", lambda config, start: started.append((config, start)))
    for arguments in ([], ["--init", "photo-x4"]):
        monkeypatch.setattr(sys, "argv", ["train_photo_x4.py", "--out", "run", *arguments])
        example["main"]()
    (config, start), (_, init) = started
    assert start is None
    training.Trainer(replace(config, device="cpu"), init)  # its options are those of photo-x4
    expected = weights.load("photo-x4").unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in init.unet.state_dict().items())


def test_train_skips_what_it_cannot_use(here, capsys):
    picture("in/a.png", (32, 32))
    picture("in/small.png", (32, 12))
    (here / "in" / "broken.png").write_bytes(b"no picture")
    small = ["--iterations", "1", "--channels", "8", "--multipliers", "1", "2", "--blocks", "1", "--crop", "16"]
    small += ["--batch-size", "1", "--validation-steps", "1", "--groups", "4", "--warmup", "1"]
    arguments = ["train", "--data", "in", "--out", "run", *small]
    for device in ("cuda:77", "cpux"):
        assert main([*arguments, "--device", device]) == 2
        assert f"sr3fast: device {device} is not there" in capsys.readouterr().err
    assert main([*arguments, "--device", "cpu"]) == 0
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("sr3fast: ")]
    assert len(lines) == 3 and lines[0].startswith("sr3fast: skipped in/broken.png: ")
    assert lines[1].startswith("sr3fast: skipped in/small.png: a picture must hold a crop of 16 pixels")
    assert lines[2] == "sr3fast: pictures skipped: 2"
    assert "Skipped" not in error and "warnings.warn" not in error


def test_train_is_dispatched(here, capsys):
    assert main(["train", "--data", "nowhere", "--out", "run", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "sr3fast: nowhere: no such file or folder\n"
    assert files(here) == []


def test_the_demo(here, folder, capsys, monkeypatch):
    """With a tiny network: it says where the picture is, how long it took and how near it came."""
    demo = Path(__file__).parents[1] / "examples" / "demo.py"
    monkeypatch.setattr(sys, "argv", [str(demo), "--weights", str(folder), "--steps", "4"])
    runpy.run_path(str(demo), run_name="__main__")
    text = capsys.readouterr().out
    assert "4 steps in" in text and "picture: demo-output/picture.png" in text
    truth = Image.open(demo.with_name("chelsea.png")).convert("RGB").crop((0, 0, 448, 300))
    source = Image.open("demo-output/source.png")
    assert source.tobytes() == image.bicubic(truth, (112, 75)).tobytes()
    bicubic = image.bicubic(source, (448, 300))
    pair = image.to_tensor(bicubic)[None], image.to_tensor(truth)[None]
    psnr, ssim = metrics.psnr(*pair).item(), metrics.ssim(*pair).item()
    assert f"{psnr:6.2f} dB {ssim:7.4f}" in text
    assert Image.open("demo-output/result.png").size == (448, 300)
    assert Image.open("demo-output/picture.png").width == 7 * 160 + 6 * 4


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "solver_step" in text and "group_norm_silu" in text


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("upscale", "train", "evaluate", "info"))
    assert main(["enlarge"]) == 2
    assert "enlarge is none of upscale, train, evaluate, info" in capsys.readouterr().err


def test_import_is_light():
    """`import sr3fast` and its help load neither torch's users nor tyro."""
    code = "import sys, sr3fast.__main__ as m; m.main([]); sys.exit({'tyro', 'PIL'} & set(sys.modules) != set())"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=120).returncode == 0


def test_python_m_exits_with_the_code(here):
    command = [sys.executable, "-P", "-m", "sr3fast", "upscale", "missing.png", "--weights", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.startswith("sr3fast: ") and result.stderr.count("\n") == 1


def test_a_checkpoint_of_janspirys_code(here, capsys):
    """The scale is in the config's name, as theirs are; without it, it is asked for."""
    theirs = janspiry_reference.diffusion(T=50, end=0.3)
    torch.save(theirs.state_dict(), "I1_E1_gen.pth")
    Path("sr_4_16.json").write_text('{"norm_groups": 8} // as theirs have comments')
    picture("photo.png")
    options = ["upscale", "photo.png", "--steps", "2", "--device", "cpu", "--config", "sr_4_16.json"]
    assert main([*options, "--weights", "I1_E1_gen.pth"]) == 0
    unet, schedule = janspiry.load("I1_E1_gen.pth", config="sr_4_16.json")
    expected = upscale("photo.png", weights.Model(unet, schedule, scale=4), steps=2, device="cpu")
    assert np.array_equal(np.asarray(Image.open("photo-x4.png")), np.asarray(expected))
    assert main([*options, "--weights", "I1_E1", "--out", "same.png"]) == 0
    assert Path("same.png").read_bytes() == Path("photo-x4.png").read_bytes()
    sizes = {"train": {"l_resolution": 4, "r_resolution": 16}}
    Path("sizes.json").write_text(json.dumps({"model": {"unet": {"norm_groups": 8}}, "datasets": sizes}))
    assert main([*options[:-1], "sizes.json", "--weights", "I1_E1", "--out", "sizes.png"]) == 0
    assert Path("sizes.png").read_bytes() == Path("photo-x4.png").read_bytes()
    Path("sr_4_16.json").rename("mine.json")
    capsys.readouterr()
    assert main([*options[:-1], "mine.json", "--weights", "I1_E1", "--out", "x.png"]) == 2
    assert "do not say how much they enlarge: give the scale" in capsys.readouterr().err


# Bad input


def refused(here, folder, capsys, *arguments, match):
    """One line that says what to do, exit code 2, and nothing written."""
    before = files(here)
    capsys.readouterr()
    assert run(folder, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sr3fast: ") and match in lines[0]
    assert files(here) == before


def test_not_an_image(here, folder, capsys):
    Path("text.png").write_text("hello")
    refused(here, folder, capsys, "text.png", match="text.png: not an image that Pillow can read: convert")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1)], ids=str)
def test_one_pixel(here, folder, size):
    picture("dot.png", size)
    assert run(folder, "dot.png", "--consistency") == 0
    assert Image.open("dot-x4.png").size == (4 * size[0], 4 * size[1])


def test_an_empty_name(here, folder, capsys):
    picture("photo.png")
    for command, *arguments in (("upscale", "photo.png", "--out", ""), ("evaluate", "")):
        assert run(folder, *arguments, command=command) == 2
        assert "is empty: is a variable of the shell unset?" in capsys.readouterr().err


def test_a_long_name_and_a_picture_that_cannot_be_written(here, folder, capsys, monkeypatch):
    picture(f"in/{'n' * 245}.png")
    picture("in/a.png")
    picture("in/z.png")
    write = image.write

    def denied(made, path, **options):
        if path.name == "a.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        write(made, path, **options)

    monkeypatch.setattr(image, "write", denied)
    assert run(folder, "in") == 2
    assert files("in-x4") == [f"{'n' * 245}.png", "z.png"]
    assert "in-x4/a.png: Permission denied" in capsys.readouterr().err


def test_a_reader_that_goes_away(here, folder):
    """Upscaling stops, and says so by its exit code; training goes on."""
    for name in "abc":
        picture(f"in/{name}.png", (32, 32))
    script = "import sys; from sr3fast.__main__ import main; sys.exit(main(sys.argv[1:]))"
    common = [sys.executable, "-P", "-c", script]
    train = ["train", "--data", "in", "--out", "run", "--crop", "16", "--channels", "8", "--multipliers", "1", *SMALL]
    for arguments, code in (
        (["upscale", "in", "--weights", str(folder), "--device", "cpu"], 141),
        ([*train, "--log-every", "1", "--iterations", "3"], 0),
    ):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*common, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert torch.load("run/checkpoint.pt", weights_only=True)["iteration"] == 3
    code = f"import sys; sys.stdout = None; {script}"  # as with >&-
    arguments = ["train", "--resume", "--out", "run", "--iterations", "4", "--log-every", "1"]
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_empty_file(here, folder, capsys):
    Path("empty.png").touch()
    refused(here, folder, capsys, "empty.png", match="empty.png: the file is empty (0 bytes): remove it or copy")


def test_truncated_file(here, folder, capsys):
    data = picture("whole.png", (64, 64)).read_bytes()
    Path("cut.png").write_bytes(data[: len(data) // 2])
    refused(here, folder, capsys, "cut.png", match="cut.png: cut short or broken")


def test_a_bomb_of_30000_by_30000(here, folder, capsys):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    Path("bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    refused(here, folder, capsys, "bomb.png", match="parts first")


def test_a_checkpoint_of_another_network(here, folder, capsys, tmp_path_factory):
    picture("photo.png")
    other = tmp_path_factory.mktemp("other")
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((folder / name).read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["unet"]["multipliers"] = [1, 1, 1, 4]
    (other / "config.json").write_text(json.dumps(config))
    refused(here, other, capsys, "photo.png", match="[16, 8, 3, 3], not [32, 8, 3, 3]")


def test_a_pickle_that_would_run_code(here, capsys, tmp_path_factory):
    picture("photo.png")
    places = tmp_path_factory.mktemp("pickle")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(places / "it ran"),)

    path = places / "I1_E1_gen.pth"
    torch.save({"denoise_fn.downs.0.weight": Evil()}, path)
    refused(here, path, capsys, "photo.png", match=str(path))
    path.write_bytes(pickle.dumps(Evil()))
    refused(here, path, capsys, "photo.png", match=str(path))
    assert not (places / "it ran").exists()


def test_steps_0(here, folder, capsys):
    picture("photo.png")
    refused(here, folder, capsys, "photo.png", "--steps", "0", match="steps must be")


@pytest.mark.parametrize("betas", [[0.1, 1.0], [0.1, -0.2], [0.1, 2.5]])
def test_a_schedule_with_gamma_outside_0_to_1(here, folder, capsys, tmp_path_factory, betas):
    picture("photo.png")
    other = tmp_path_factory.mktemp("schedule")
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["schedule"] = {"betas": betas}
    (other / "config.json").write_text(json.dumps(config))
    refused(here, other, capsys, "photo.png", match="beta")


def test_no_space_on_the_disk(here, folder, capsys, monkeypatch):
    picture("photo.png")
    save = Image.Image.save

    def full(self, file, **options):
        if isinstance(file, Path):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(folder, "photo.png") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "sr3fast: photo-x4.png: no space left on the disk: free some or write elsewhere"
    assert files(here) == ["photo.png"]


def test_a_place_that_cannot_be_written(here, folder, capsys, monkeypatch):
    """The user's path is named, not the temporary one beside it."""
    picture("photo.png")

    def denied(self, file, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda self, file, **o: isinstance(file, Path) and denied(self, file))
        for out, result in (("out/x.png", "out/x.png"), ("out", "out/photo.png")):
            assert run(folder, "photo.png", "--out", out) == 2
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert line == f"sr3fast: {result}: {os.strerror(errno.EACCES)}"


def test_a_place_that_cannot_be_written_is_found_before_any_step(here, folder, capsys, monkeypatch):
    picture("photo.png")
    monkeypatch.setattr(UNet, "forward", None)
    refused(here, folder, capsys, "photo.png", "--out", "photo.png/x.png", match="sr3fast: photo.png/x.png: Not a dir")
    refused(
        here, folder, capsys, "photo.png", "--out", "photo.png/new", match="photo.png/new/photo.png: Not a directory"
    )
    assert run(folder, "photo.png", "--json", "photo.png/x.json", command="evaluate") == 2
    assert capsys.readouterr().err == "sr3fast: photo.png/x.json: Not a directory\n"
    Path("folder").mkdir()
    assert run(folder, "photo.png", "--json", "folder", command="evaluate") == 2
    assert capsys.readouterr().err == "sr3fast: folder: Is a directory\n"
    Path("broken").symlink_to("nowhere")
    refused(here, folder, capsys, "photo.png", "--out", "broken", match="sr3fast: broken/photo.png: No such file")


def test_a_finished_run_writes_nothing(here, folder, monkeypatch, capsys):
    picture("photo.png")
    assert run(folder, "photo.png") == 0
    monkeypatch.setattr(image, "check_writable", None)  # of a folder that cannot be written
    assert run(folder, "photo.png") == 0
    assert "is there already" in capsys.readouterr().out


def test_a_short_name_is_told_too(here, folder, capsys):
    Image.new("F", (8, 8)).save("m.tiff")
    Path("m.tiff").rename("m")  # as in "a picture of mode F"
    refused(here, folder, capsys, "m", match="sr3fast: m: a picture of mode F has no fixed range")
    assert run(folder, "m", command="evaluate") == 2
    assert capsys.readouterr().err.startswith("sr3fast: m: a picture of mode F has no fixed range")


def test_a_suffix_of_no_format(here, folder, capsys):
    picture("photo.png")
    refused(here, folder, capsys, "photo.png", "--out", "x.foo", match="--out x.foo: .foo is none of .apng ")
    Path("x.foo").mkdir()
    assert run(folder, "photo.png", "--out", "x.foo") == 0
    assert run(folder, "photo.png", "--out", "y") == 0
    assert files(here) == ["photo.png", "x.foo/photo.png", "y/photo.png"]


def test_a_device_that_is_not_there(here, folder, capsys):
    picture("photo.png")
    assert main(["upscale", "photo.png", "--weights", str(folder), "--device", "cuda:77"]) == 2
    assert "device cuda:77 is not there" in capsys.readouterr().err


def test_a_format_that_cannot_hold_it(here, folder, capsys):
    Image.new("RGBA", (4, 4)).save("clear.png")
    refused(here, folder, capsys, "clear.png", "--out", "x.jpg", match="JPEG cannot hold a picture of mode RGBA")


def test_weights_that_are_not_there(here, capsys):
    picture("photo.png")
    refused(here, "nowhere", capsys, "photo.png", match="no weights at 'nowhere'")
