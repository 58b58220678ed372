"""Training: Algorithm 1 against its formulas, resumption bit for bit, ranks, weights to begin with, failures."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sr3fast import noise, ops, training, weights
from sr3fast.data import DataError, Skipped
from sr3fast.schedule import Schedule
from sr3fast.training import TrainConfig, Trainer, TrainingError, loop, ranks, train

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(), groups=4, crop=16, batch_size=4, warmup=2)
SMALL |= dict(lr=2e-3, threads=1, save_every=3, log_every=2, ema=0.9, device="cpu", validation_steps=2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten pictures of smooth colours and edges."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    h, w = np.mgrid[0:32, 0:40] / 32
    for i in range(10):
        waves = [np.sin(2 * math.pi * (rng.uniform(0, 3) * h + rng.uniform(0, 3) * w)) for _ in range(3)]
        values = np.stack(waves, -1) * 100 + 128
        values[: rng.integers(8, 24)] *= rng.uniform(0.3, 1)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def config(photographs, out, **changes):
    return TrainConfig(data=photographs, out=out, **{**SMALL, "iterations": 6, **changes})


def checkpoint(out):
    return torch.load(Path(out) / training.CHECKPOINT, weights_only=True)


def assert_same_run(a, b):
    a, b = checkpoint(a), checkpoint(b)
    assert a["iteration"] == b["iteration"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    for mine, theirs in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(torch.equal(x, y) for x, y in zip(a["rng"][0], b["rng"][0], strict=True))


# Algorithm 1


@pytest.mark.parametrize("form", ["gamma", "sqrt_gamma"])
def test_gamma_is_uniform_between_its_neighbours(form):
    schedule = Schedule.named(T=50, start=1e-3, end=0.3)
    seeds = noise.seeds(9 << 32, 4000)
    gamma, t = training.p_gamma(schedule, seeds, 17, form=form)
    assert gamma.dtype == torch.float64 and t.min() == 1 and t.max() == 50
    assert torch.bincount(t, minlength=51)[1:].float().std() < 3 * math.sqrt(4000 / 50)
    f = (lambda g: g) if form == "gamma" else torch.sqrt
    low, high = f(schedule.gamma[t]), f(schedule.gamma[t - 1])
    place = (f(gamma) - low) / (high - low)
    assert place.min() > -1e-9 and place.max() < 1 + 1e-9
    assert abs(place.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
    _, u = noise.uniforms(seeds, noise.LEVEL, 17)
    assert (place - u.double()).abs().max() < 1e-9


def test_one_t_a_batch_is_that_of_the_first_place():
    schedule = Schedule.named(T=50, start=1e-3, end=0.3)
    base = 5 << 32
    gamma, t = training.p_gamma(schedule, noise.seeds(base, 8), 3, t_seed=base)
    alone = training.p_gamma(schedule, noise.seeds(base, 1), 3)[1]
    assert (t == alone).all() and len(gamma.unique()) == 8


@pytest.mark.parametrize("p", [1, 2])
def test_loss_is_the_equation(p):
    torch.manual_seed(0)
    x, y_0, gamma = torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7), torch.tensor([0.3, 0.9])
    seeds, level = noise.seeds([11, 1 << 40], 2), gamma.sqrt()[:, None]
    eps = noise.normals(seeds, y_0.shape, noise.TRAIN, 6).double()
    g = gamma.double().view(-1, 1, 1, 1)
    y_t = g.sqrt() * y_0.double() + (1 - g).sqrt() * eps
    f = lambda x, y, level: 0.5 * x - y * level[:, :, None, None]  # noqa: E731
    expected = (f(x.double(), y_t, level.double()) - eps).abs().pow(p).mean()
    loss = training.denoising_loss(f, x, y_0, gamma, level, seeds, 6, p)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_learning_rate_rises_and_falls(photographs, tmp_path):
    c = config(photographs, tmp_path, iterations=20, warmup=4, cooldown=10, lr=1.0)
    rates = [training.learning_rate(c, i) for i in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1] and rates[10] == 1
    assert rates[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_accumulation_equals_one_batch_and_ema_follows(photographs, tmp_path):
    whole, parts = (Trainer(config(photographs, tmp_path, accumulate=n, dropout=0.0, dtype="float32")) for n in (1, 4))
    average = [p.detach().clone() for p in whole.averaged.parameters()]
    losses = []
    for trainer in (whole, parts):
        pictures = trainer.pictures(photographs, "flip")
        batches = trainer.batches(pictures)
        losses.append([trainer.step(batches) for _ in range(2)])
        if trainer is whole:
            continue
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(whole.unet.parameters(), parts.unet.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4 < SMALL["lr"]
    # after one iteration decay is 2/11, after the second 3/12
    first = Trainer(config(photographs, tmp_path, dropout=0.0, dtype="float32"))
    first.step(first.batches(first.pictures(photographs, "flip")))
    for e, p1, p2, got in zip(
        average, first.unet.parameters(), whole.unet.parameters(), whole.averaged.parameters(), strict=True
    ):
        expected = 3 / 12 * (2 / 11 * e + 9 / 11 * p1) + 9 / 12 * p2
        assert (got - expected).abs().max() < 1e-6
        assert got.grad_fn is None and not got.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        dict(variant="ddpm", level="t"),
        dict(level="gamma", p_gamma="sqrt_gamma", t_per="batch", p=1),
        dict(optimizer="adamw", weight_decay=0.1, target="residual", k=3.0, clip=1.5),
    ],
)
def test_other_forms_run_and_load(photographs, tmp_path, changes):
    model = train(config(photographs, tmp_path, iterations=2, **changes))
    loaded = weights.load(tmp_path / training.EXPORT)
    assert (loaded.level, loaded.target, loaded.scale) == (model.level, model.target, 4)
    for name, value in model.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)


def test_ten_photographs_and_the_loss_falls(photographs, tmp_path):
    train(
        config(
            photographs,
            tmp_path,
            iterations=80,
            validation=photographs,
            validate_every=80,
            workers=1,
            save_every=80,
        )
    )
    log = [json.loads(line) for line in (tmp_path / training.LOG).read_text().splitlines()]
    assert log[-1]["iteration"] == 80
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    with Image.open(tmp_path / training.SHEET) as sheet:
        assert sheet.size == (3 * 40, 4 * 32)


def test_pictures_smaller_than_the_crop_are_left_out_as_broken_ones_are(photographs, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("0.png", "1.png"):
        (few / name).write_bytes((photographs / name).read_bytes())
    Image.new("RGB", (40, 12)).save(few / "small.png")
    (few / "broken.png").write_bytes(b"no picture")
    with pytest.warns(Skipped) as record:
        train(config(few, tmp_path / "run", iterations=2))
    messages = [str(w.message) for w in record if w.category is Skipped]
    assert len(messages) == 2 and messages[0].startswith(f"skipped {few / 'broken.png'}: ")
    assert messages[1] == (
        f"skipped {few / 'small.png'}: a picture must hold a crop of 16 pixels, whole at 1/4: got 12 x 40"
    )
    assert checkpoint(tmp_path / "run")["iteration"] == 2


# Resumption


def test_resumed_run_equals_an_uninterrupted_one(photographs, tmp_path):
    options = dict(dropout=0.2, accumulate=2, augment="dihedral")
    train(config(photographs, tmp_path / "whole", **options))
    train(config(photographs, tmp_path / "parts", iterations=3, **options))
    train(config(photographs, tmp_path / "parts", resume=True, **options))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


RUN = """
import sys, os, pathlib, torch
sys.path.insert(0, sys.argv[1])
from test_training import *
{body}
"""


def start(body, *arguments, ranks=0, tmp_path=None):
    script = tmp_path / "run.py"
    script.write_text(RUN.format(body=body))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(here.parent),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(here), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_run_resumes_to_the_same_weights(photographs, tmp_path):
    train(config(photographs, tmp_path / "whole", dropout=0.1, iterations=30))
    body = """
data, out = map(pathlib.Path, sys.argv[2:])
train(config(data, out, dropout=0.1, iterations=10**6, save_every=1))
"""
    process = start(body, photographs, tmp_path / "killed", tmp_path=tmp_path)
    file = tmp_path / "killed" / training.CHECKPOINT
    deadline = time.monotonic() + 300
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    reached = checkpoint(tmp_path / "killed")["iteration"]
    assert 1 <= reached < 30, f"killed too late, at iteration {reached}"
    train(config(photographs, tmp_path / "killed", dropout=0.1, iterations=30, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# Ranks


def test_two_ranks_equal_one_with_twice_the_batch(photographs, tmp_path):
    train(config(photographs, tmp_path / "one", dropout=0.0, dtype="float32", batch_size=8, log_every=1))
    body = """
data, out = map(pathlib.Path, sys.argv[2:])
train(config(data, out, dropout=0.0, dtype="float32", log_every=1))
# a thread of the process group that outlives the interpreter aborts it, now and then
threads = [comm.read_text() for comm in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads
"""
    process = start(body, photographs, tmp_path / "two", ranks=2, tmp_path=tmp_path)
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / training.LOG).read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 6
    a, b = checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"]
    # Adam divides by the root of a squared gradient: rounding may move a weight by a small part of lr
    assert all((a[name] - b[name]).abs().max() < 6 * 0.05 * SMALL["lr"] for name in a)


def test_a_rank_that_dies_stops_the_others_and_leaves_the_checkpoint(photographs, tmp_path):
    body = """
step = Trainer.step
def fail(self, batches):
    if self.iteration == 4 and self.ranks.rank == 1:
        os._exit(9)
    return step(self, batches)
Trainer.step = fail
train(config(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])))
"""
    process = start(body, photographs, tmp_path / "run", ranks=2, tmp_path=tmp_path)
    output = process.communicate(timeout=500)[0]
    assert process.returncode != 0
    assert checkpoint(tmp_path / "run")["iteration"] == 3, output


def test_a_lost_connection_is_told(photographs, tmp_path, monkeypatch):
    def lost(self, batches):
        self.ranks.world = 2
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(Trainer, "step", lost)
    with pytest.raises(TrainingError, match=r"a rank died .* at iteration 0 .*--resume"):
        train(config(photographs, tmp_path))


# What is refused


def test_nan_stops_and_leaves_the_checkpoint(photographs, tmp_path, monkeypatch):
    loss = training.denoising_loss

    def broken(*arguments):
        value = loss(*arguments)
        return value * math.nan if int(arguments[6]) == 4 else value

    monkeypatch.setattr("sr3fast.training.trainer.denoising_loss", broken)
    with pytest.raises(
        TrainingError,
        match=r"loss is nan at iteration 4: try a smaller --lr .* with --resume, from the last checkpoint",
    ):
        train(config(photographs, tmp_path))
    state = checkpoint(tmp_path)
    assert state["iteration"] == 3 and all(v.isfinite().all() for v in state["model"].values())


def test_an_infinite_gradient_stops_and_changes_nothing(photographs, tmp_path):
    trainer = Trainer(config(photographs, tmp_path, max_norm=0))
    batches = trainer.batches(trainer.pictures(photographs, "flip"))
    trainer.step(batches)
    trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in (*trainer.parameters, *trainer.averaged.parameters())]
    with pytest.raises(TrainingError, match=r"norm is (inf|nan) at iteration 1: .* --dtype float32, anew$"):
        trainer.step(batches)
    now = (*trainer.parameters, *trainer.averaged.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_an_error_ends_the_process_that_has_others_to_load(photographs, tmp_path):
    """They leave signals alone, but not the one with which the process takes its leave."""
    body = """
def fail(self, batches):
    next(batches)
    raise RuntimeError("boom")
Trainer.step = fail
train(config(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), workers=2))
"""
    process = start(body, photographs, tmp_path / "run", tmp_path=tmp_path)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "RuntimeError: boom" in output


def test_what_was_logged_after_the_checkpoint_is_logged_once(photographs, tmp_path):
    train(config(photographs, tmp_path, log_every=1, iterations=3))
    with open(tmp_path / training.LOG, "a") as log:
        log.write(json.dumps({"iteration": 4, "loss": 9.0}) + '\n{"iteration": 5, "lo')  # the machine went down
    train(config(photographs, tmp_path, log_every=1, resume=True))
    entries = [json.loads(line) for line in (tmp_path / training.LOG).read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [1, 2, 3, 4, 5, 6] and entries[3]["loss"] != 9.0


def test_threads_and_random_numbers_are_the_callers_again(photographs, tmp_path):
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    train(config(photographs, tmp_path / "run", iterations=1, warmup=1, threads=1))
    with pytest.raises(DataError):
        train(config(photographs, tmp_path / "none", crop=64, threads=1))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), generator)


def test_the_finest_noise_is_what_the_network_is_told(photographs, tmp_path):
    """1 - gamma_1 is 1e-6, which a float32 gamma does not hold."""
    trainer = Trainer(config(photographs, tmp_path, T=1, beta_start=1e-6, beta_end=1e-6))
    y_0 = torch.zeros(4, 3, 16, 16)
    _, _, gamma, _, seeds, _ = trainer._inputs(y_0, y_0, 0)
    y_t, eps = ops.q_sample(y_0, gamma, seeds, 0)
    drawn, _ = training.p_gamma(trainer.model.schedule, seeds, 0)
    sigma = (1 - drawn).sqrt().view(-1, 1, 1, 1)
    assert ((y_t.double() - sigma * eps.double()).abs() < 1e-5 * sigma).all()


def test_a_bright_picture_is_validated_without_a_word(tmp_path, recwarn):
    Image.new("RGB", (32, 32), (200, 220, 240)).save(tmp_path / "a.png")
    trainer = Trainer(config(tmp_path, tmp_path / "run"))
    training.validate(trainer.averaged_model(), trainer.pictures(tmp_path, "none"), 2)
    assert not [w for w in recwarn if "looks like" in str(w.message)]


def test_algorithm_1_refuses_another_form_and_another_norm():
    schedule = Schedule.named("linear", T=10, start=1e-4, end=0.5)
    with pytest.raises(ValueError, match='form must be "gamma" or "sqrt_gamma": got \'sqrtgamma\''):
        training.p_gamma(schedule, torch.tensor([1]), 0, form="sqrtgamma")
    y_0, one = torch.zeros(1, 3, 8, 8), torch.tensor([0.5])
    with pytest.raises(ValueError, match="p must be 1 or 2: got 3"):
        training.denoising_loss(lambda x, y_t, level: y_t, None, y_0, one, one, torch.tensor([1]), 0, p=3)


def test_full_disk_leaves_the_last_checkpoint(photographs, tmp_path):
    resource = pytest.importorskip("resource")
    trainer = Trainer(config(photographs, tmp_path))
    trainer.save()
    good = (tmp_path / training.CHECKPOINT).read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
        with pytest.raises(TrainingError, match=r"could not save at iteration 0 .*last good checkpoint is .*pt"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / training.CHECKPOINT).read_bytes() == good
    assert sorted(f.name for f in tmp_path.iterdir()) == [training.CHECKPOINT, training.EXPORT]


def test_what_may_save_a_run_may_change_when_it_goes_on(photographs, tmp_path):
    train(config(photographs, tmp_path, iterations=2))
    given = {"lr": 1e-5, "warmup": 1, "max_norm": 0.1, "dtype": "bfloat16"}
    with pytest.warns(UserWarning) as told:
        train(config(photographs, tmp_path, iterations=3, resume=True, **given))
    said = " ".join(str(w.message) for w in told)
    assert "from here on lr=1e-05, it was 0.002" in said and "from here on max_norm=0.1, it was" in said
    assert checkpoint(tmp_path)["optimizer"]["param_groups"][0]["lr"] == 1e-5


def test_the_dtype_is_what_the_device_is_fast_in(photographs, tmp_path, monkeypatch):
    for fast in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("sr3fast.training.trainer.fast_dtype", lambda device, fast=fast: fast)
        trainer = Trainer(config(photographs, tmp_path))
        dtypes = set()
        trainer.unet.conv_out.register_forward_hook(lambda *args, seen=dtypes: seen.add(args[-1].dtype))
        trainer.step(trainer.batches(trainer.pictures(photographs, "flip")))
        assert dtypes == {fast} and f"torch.{trainer.config.dtype}" == str(fast)  # which a resumed run keeps


def test_a_run_may_not_lie_among_its_pictures(photographs, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    assert training.train(config(folder, folder / ".run", iterations=1)).unet  # hidden
    for out in (folder, folder / "run"):
        with pytest.raises(
            ValueError, match=r"out must not lie in a folder of pictures, .*: its contact sheet would be"
        ):
            train(config(folder, out))
    assert not (folder / "run").exists()


def test_a_ddpm_network_is_told_t(photographs, tmp_path):
    assert training.fresh(config(photographs, tmp_path, variant="ddpm")).level == "t"


def test_refusals(photographs, tmp_path):
    Trainer(config(photographs, tmp_path / "run")).save()
    with pytest.raises(FileExistsError, match="holds a run: give --resume"):
        train(config(photographs, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"was trained with augment=.flip., not .none."):
        train(config(photographs, tmp_path / "run", resume=True, augment="none"))
    with pytest.raises(ValueError, match="channels must be that of the weights, 8, or left out: got 16"):
        train(config(photographs, tmp_path / "run", resume=True, channels=16))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(config(photographs, tmp_path / "none", resume=True))
    with pytest.raises(DataError, match="must hold a crop of 64"):
        train(config(photographs, tmp_path / "none", crop=64))
    for changes, error, message in (
        ({"accumulate": 3}, ValueError, "accumulate must divide the batch: got batch_size=4, accumulate=3"),
        ({"iterations": 10.5}, TypeError, r"iterations must be a whole number: got 10\.5"),
        ({"cooldown": -5}, ValueError, "cooldown must be at least 0: got -5"),
        ({"validation_steps": 0}, ValueError, "validation_steps must be at least 1: got 0"),
        ({"seed": 1 << 32}, ValueError, r"seed must be below 2\^32.*: got 4294967296"),
        ({"augment": "turn"}, ValueError, r"augment must be one of \('none', 'flip', 'dihedral'\): got 'turn'"),
        ({"max_norm": -1.0}, ValueError, r"max_norm and weight_decay must be at least 0: got -1\.0 and 0\.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\): got \(0\.9, 1\.0\)"),
        ({"lr": math.nan}, ValueError, "lr must be above 0"),
    ):
        with pytest.raises(error, match=message):
            config(photographs, tmp_path, **changes)
    with pytest.raises(ValueError, match=r"multiple of 2\^\(levels - 1\) = 2: got 15"):
        Trainer(config(photographs, tmp_path, crop=15))
    with pytest.raises(ValueError, match="device cpux is not there"):
        train(config(photographs, tmp_path / "none", device="cpux"))
    with pytest.raises(ValueError, match="capture needs a CUDA device"):
        Trainer(config(photographs, tmp_path, capture=True))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("schedule", ["linear", "quad", "cosine", "const", "warmup10"])
def test_a_run_resumes_with_the_very_same_options(photographs, tmp_path, schedule):
    options = {"schedule": schedule, "beta_start": 1e-6, "beta_end": 1e-2, "multipliers": [1, 2]}
    Trainer(config(photographs, tmp_path, **options)).save()
    Trainer(config(photographs, tmp_path, resume=True, **options))


def test_a_checkpoint_of_before_is_told(photographs, tmp_path):
    Trainer(config(photographs, tmp_path)).save()
    state = checkpoint(tmp_path)
    del state["description"]
    torch.save(state, tmp_path / training.CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of an older sr3fast: .* --init .*model"):
        train(config(photographs, tmp_path, resume=True))


def test_a_damaged_checkpoint_is_told(photographs, tmp_path):
    Trainer(config(photographs, tmp_path)).save()
    file = tmp_path / training.CHECKPOINT
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged, or no checkpoint .* --init .*model") as error:
            train(config(photographs, tmp_path, resume=True))
        assert "weights_only" not in str(error.value)
    torch.save({"weights": 1}, file)
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        train(config(photographs, tmp_path, resume=True))


def test_a_warmup_that_the_run_does_not_outlive(photographs, tmp_path):
    with pytest.warns(UserWarning, match=r"lr never reaches 0\.002: got iterations=1, warmup=2"):
        train(config(photographs, tmp_path, iterations=1))


# Interruption


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        yield int(child)
        yield from descendants(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_saves_first(photographs, tmp_path, number, world):
    body = """
data, out = map(pathlib.Path, sys.argv[2:])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup to this
step = Trainer.step
def told(self, batches):
    loss = step(self, batches)
    if self.iteration == 2 and self.ranks.rank == 0:
        (out / "ready").touch()
    return loss
Trainer.step = told
train(config(data, out, dropout=0.1, workers=1, iterations=10**6, save_every=10**6))
"""
    process = start(body, photographs, tmp_path / "run", ranks=world if world > 1 else 0, tmp_path=tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "ready").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    group = [*descendants(process.pid), process.pid]
    for _ in range(2 if number == signal.SIGHUP else 1):  # the kernel and the shell each say that a terminal is closed
        for pid in group:  # as a terminal or a cluster does
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    try:
        output = process.communicate(timeout=100)[0]
    finally:
        for pid in group:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == -number if world == 1 else process.returncode, output
    state = checkpoint(tmp_path / "run")
    reached = state["iteration"]
    assert f"{number.name}: iteration {reached} is in {tmp_path / 'run' / training.CHECKPOINT}" in output
    assert output.count("--resume goes on from it") == 1 and len(state["rng"]) == world
    if world == 1:
        train(config(photographs, tmp_path / "whole", dropout=0.1, iterations=reached + 1))
        train(config(photographs, tmp_path / "run", dropout=0.1, iterations=reached + 1, resume=True))
        assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.fixture
def interruptible():
    """A background job is born deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_strikes_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ranks.between_iterations(1) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not reached")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):  # another signal too
        terminate = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with ranks.between_iterations(1):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                pytest.fail("not reached")
        finally:
            signal.signal(signal.SIGTERM, terminate)


@pytest.mark.usefixtures("interruptible")
def test_what_a_launcher_sends_on_strikes_once():
    with pytest.raises(KeyboardInterrupt), ranks.between_iterations(2) as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert signals == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]


def test_a_signal_to_another_rank_strikes_here_too(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks.Ranks, "largest", lambda self, number, device: signal.SIGTERM)
    struck = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: struck.append(number))
    try:
        train(config(photographs, tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert struck == [signal.SIGTERM] and checkpoint(tmp_path)["iteration"] == 1


def test_nothing_disturbs_the_last_save(photographs, tmp_path, monkeypatch):
    save = Trainer.save

    def pressed_again(self):
        signal.raise_signal(signal.SIGINT)
        save(self)

    def step(self, batches):
        signal.raise_signal(signal.SIGINT)
        return real(self, batches)

    real = Trainer.step
    monkeypatch.setattr(Trainer, "save", pressed_again)
    monkeypatch.setattr(Trainer, "step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config(photographs, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint(tmp_path)["iteration"] == 1


def test_off_a_terminal_a_run_tells_its_way(photographs, tmp_path, capsys):
    train(config(photographs, tmp_path))
    told = capsys.readouterr().out
    assert "iteration 4: loss 0." in told or "iteration 4: loss 1." in told
    assert f"the weights are in {tmp_path / training.EXPORT}" in told
    train(config(photographs, tmp_path, iterations=3, resume=True))
    assert "iteration 6 is reached already" in capsys.readouterr().out


def test_options_of_the_model_that_would_do_nothing(photographs, tmp_path):
    with pytest.raises(ValueError, match="k are of a residual, and the target is the image"):
        Trainer(config(photographs, tmp_path, k=3.0))
    with pytest.raises(ValueError, match=r"attention must be at sides of the levels, \[16, 8\]: got \[5\]"):
        Trainer(config(photographs, tmp_path, attention=(5, 8)))


# Validation


def test_validation_is_logged_and_runs_once_an_iteration(photographs, tmp_path, monkeypatch):
    calls, validate = [], training.validate
    monkeypatch.setattr(loop, "validate", lambda *a: calls.append(a[1]) or validate(*a))
    train(config(photographs, tmp_path, iterations=4, validation=photographs, validate_every=2))
    log = [json.loads(line) for line in (tmp_path / training.LOG).read_text().splitlines()]
    scores = [entry for entry in log if "psnr" in entry]
    assert [entry["iteration"] for entry in scores] == [2, 4] and len(calls) == 2
    assert all(scores[0].keys() == {"iteration", "psnr", "ssim", "consistency"} for _ in scores)


@pytest.mark.parametrize(("multipliers", "scale"), [((1, 1, 1, 1), 5), ((1, 2), 2.5), ((1, 1, 1), 3)])
def test_validation_of_any_size_and_scale(photographs, tmp_path, multipliers, scale):
    """Pictures of 40 x 32 hold no multiple of both 2^3 and 5 in each side, and 2.5 is no whole number."""
    model = train(config(photographs, tmp_path, iterations=2, multipliers=multipliers, scale=scale))
    pictures = Trainer(bare(photographs, tmp_path / "other"), model).pictures(photographs, "none")
    scores, rows = training.validate(model, pictures, 2)
    assert math.isfinite(scores["psnr"])
    for x, y, truth in rows:
        size = [round(int(n / scale) * scale) for n in (32, 40)]
        assert list(x.shape[1:]) == list(y.shape[1:]) == list(truth.shape[1:]) == size


def test_validation_where_one_picture_is_too_small_for_ssim(photographs, tmp_path):
    for name, side in (("a", 32), ("b", 8)):
        with Image.open(photographs / "0.png") as picture:
            picture.crop((0, 0, side, side)).save(tmp_path / f"{name}.png")
    trainer = Trainer(config(photographs, tmp_path, crop=8))
    scores, rows = training.validate(trainer.averaged_model(), trainer.pictures(tmp_path, "none"), 1)
    assert len(rows) == 2 and scores.keys() == {"psnr", "consistency", "ssim"}


# Weights to begin with


def bare(photographs, out, **changes):
    """A configuration that leaves the model to the weights."""
    options = {name: value for name, value in SMALL.items() if name not in training.FRESH}
    return TrainConfig(data=photographs, out=out, **{**options, "iterations": 2, **changes})


@pytest.fixture
def twice(photographs, tmp_path):
    """Weights that enlarge 2 times, of another structure, schedule, target and level than a new run's."""
    other = dict(channels=12, multipliers=(1, 1, 2), scale=2.0, target="residual", k=2.0, T=100, beta_end=0.1)
    return training.fresh(config(photographs, tmp_path, level="gamma", attention=(8,), **other))


def test_the_weights_say_what_the_run_is(photographs, tmp_path, twice):
    twice.card["steps"] = 7
    weights.save(tmp_path / "init", twice)
    # lr so small that the weights stay: what a run begins with shows in what it writes
    train(bare(photographs, tmp_path / "run", lr=1e-12), start=weights.load(tmp_path / "init"))
    made = weights.load(tmp_path / "run" / training.EXPORT)
    assert (made.scale, made.level, made.target, made.card) == (2, "gamma", twice.target, {"steps": 7})
    assert made.schedule == twice.schedule and made.unet.config == twice.unet.config
    for name, value in twice.unet.state_dict().items():
        assert torch.allclose(made.unet.state_dict()[name], value, atol=1e-6)


def test_a_run_that_began_with_weights_resumes_without_them(photographs, tmp_path, twice):
    weights.save(tmp_path / "init", twice)
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for i, iterations in enumerate(parts):
            init = None if i else weights.load(tmp_path / "init")
            train(bare(photographs, tmp_path / name, iterations=iterations, resume=i > 0), start=init)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match=r"a resumed run has its checkpoint's weights: leave out start"):
        train(bare(photographs, tmp_path / "whole", resume=True), start=twice)


def test_options_that_contradict_the_weights(photographs, tmp_path, twice):
    for name, has, given in (
        ("channels", 12, 32),
        ("multipliers", (1, 1, 2), (1, 2)),
        ("attention", (8,), (16,)),
        ("dropout", 0.0, 0.2),
        ("image_channels", 3, 1),
        ("scale", 2.0, 4.0),
        ("target", "residual", "image"),
        ("k", 2.0, 1.0),
        ("schedule", "linear", "cosine"),
        ("T", 100, 2000),
        ("beta_end", 0.1, 1e-2),
        ("level", "gamma", "sqrt_gamma"),
    ):
        expected = re.escape(f"{name} must be that of the weights, {has!r}, or left out: got {given!r}")
        with pytest.raises(ValueError, match=expected):
            train(bare(photographs, tmp_path / "run", **{name: given}), start=twice)
        Trainer(bare(photographs, tmp_path / "run", **{name: has}), twice)
    # attention is counted from the crop's side
    Trainer(bare(photographs, tmp_path / "run", crop=32, attention=(16,)), twice)
    with pytest.raises(ValueError, match=r"multiple of 2\^\(levels - 1\) = 4: got 18"):
        train(bare(photographs, tmp_path / "run", crop=18), start=twice)
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_say_their_scale(photographs, tmp_path, twice):
    twice.scale = None
    with pytest.raises(ValueError, match="do not say how much they enlarge: give the scale"):
        train(bare(photographs, tmp_path / "run"), start=twice)
    made = train(bare(photographs, tmp_path / "run", scale=2), start=twice)
    assert made.scale == 2 and train(bare(photographs, tmp_path / "further"), start=made).scale == 2


# Janspiry's checkpoints as a start


def test_janspirys_optimizer_goes_on_as_adam_would(photographs, tmp_path):
    from sr3fast.compat import janspiry
    from sr3fast.compat.janspiry import names

    torch.manual_seed(0)
    model = training.fresh(config(photographs, tmp_path, dropout=0.0))
    theirs = {f"denoise_fn.{names.their_name(n, 'sr3')}": p for n, p in model.unet.named_parameters()}
    order = sorted(theirs)  # another order than ours
    adam = torch.optim.Adam([theirs[name] for name in order], lr=SMALL["lr"])
    for parameter in theirs.values():
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    betas = model.schedule.betas.float()
    torch.save({"betas": betas, **{n: theirs[n].detach() for n in order}}, tmp_path / "I1_E1_gen.pth")
    opt = {"epoch": 1, "iter": 1, "scheduler": None, "optimizer": adam.state_dict()}
    torch.save(opt, tmp_path / "I1_E1_opt.pth")

    names = {"norm_groups": 4, "image_size": 16, "attn_res": [], "dropout": 0}
    start = janspiry.model(tmp_path / "I1_E1_gen.pth", names, scale=4)
    trainer = Trainer(bare(photographs, tmp_path), start, janspiry.moments(tmp_path / "I1_E1_gen.pth"))
    gradients = {name: torch.randn_like(p) for name, p in trainer.unet.named_parameters()}
    for (name, mine), original in zip(trainer.unet.named_parameters(), model.unet.parameters(), strict=True):
        mine.grad, original.grad = gradients[name].clone(), gradients[name].clone()
    trainer.optimizer.param_groups[0]["lr"] = SMALL["lr"]
    trainer.optimizer.step()
    adam.step()
    for mine, original in zip(trainer.unet.parameters(), model.unet.parameters(), strict=True):
        assert torch.allclose(mine, original, rtol=1e-6, atol=1e-7)
