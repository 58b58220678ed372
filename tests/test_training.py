"""Training: Algorithm 1 against its formulas, resumption bit for bit, ranks, failures, the variational
bound.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from sr3fast import noise, training, weights
from sr3fast.data import DataError, Skipped
from sr3fast.schedule import Schedule
from sr3fast.training import TrainConfig, Trainer, TrainingError, train

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
    whole, parts = (Trainer(config(photographs, tmp_path, accumulate=n, dropout=0.0, bf16=False)) for n in (1, 4))
    average = [p.detach().clone() for p in whole.averaged.parameters()]
    losses = []
    for trainer in (whole, parts):
        pictures = training._pictures(trainer.config, photographs, "flip")
        batches = trainer.batches(pictures)
        losses.append([trainer.step(batches) for _ in range(2)])
        if trainer is whole:
            continue
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(whole.unet.parameters(), parts.unet.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4 < SMALL["lr"]
    # after one iteration decay is 2/11, after the second 3/12
    first = Trainer(config(photographs, tmp_path, dropout=0.0, bf16=False))
    first.step(first.batches(training._pictures(first.config, photographs, "flip")))
    for e, p1, p2, got in zip(
        average, first.unet.parameters(), whole.unet.parameters(), whole.averaged.parameters(), strict=True
    ):
        expected = 3 / 12 * (2 / 11 * e + 9 / 11 * p1) + 9 / 12 * p2
        assert (got - expected).abs().max() < 1e-6


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
    assert np.mean([entry["loss"] for entry in log[-10:]]) < 0.8 * np.mean([entry["loss"] for entry in log[:3]])
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
    train(config(photographs, tmp_path / "one", dropout=0.0, bf16=False, batch_size=8, log_every=1))
    body = """
data, out = map(pathlib.Path, sys.argv[2:])
train(config(data, out, dropout=0.0, bf16=False, log_every=1))
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
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(Trainer, "step", lost)
    trainer = Trainer(config(photographs, tmp_path))
    trainer.ranks.world = 2
    with pytest.raises(TrainingError, match=r"a rank died .* at iteration 0 .*--resume"):
        training._guarded(trainer, training._pictures(trainer.config, photographs, "flip"), None)


# What is refused


def test_nan_stops_and_leaves_the_checkpoint(photographs, tmp_path, monkeypatch):
    loss = training.denoising_loss

    def broken(*arguments):
        value = loss(*arguments)
        return value * math.nan if int(arguments[6]) == 4 else value

    monkeypatch.setattr(training, "denoising_loss", broken)
    with pytest.raises(TrainingError, match="loss is nan at iteration 4: try a smaller lr"):
        train(config(photographs, tmp_path))
    state = checkpoint(tmp_path)
    assert state["iteration"] == 3 and all(v.isfinite().all() for v in state["model"].values())


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


def test_refusals(photographs, tmp_path):
    Trainer(config(photographs, tmp_path / "run")).save()
    with pytest.raises(FileExistsError, match="holds a run: give --resume"):
        train(config(photographs, tmp_path / "run"))
    with pytest.raises(ValueError, match="was trained with channels=8, not 16"):
        train(config(photographs, tmp_path / "run", resume=True, channels=16))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(config(photographs, tmp_path / "none", resume=True))
    with pytest.raises(DataError, match="must hold a crop of 64"):
        train(config(photographs, tmp_path / "none", crop=64))
    with pytest.raises(ValueError, match="accumulate must divide the batch: got batch_size=4, accumulate=3"):
        config(photographs, tmp_path, accumulate=3)
    with pytest.raises(ValueError, match=r"multiple of 2\^\(levels - 1\) = 2: got 15"):
        config(photographs, tmp_path, crop=15)
    with pytest.raises(ValueError, match="device cpux is not there"):
        train(config(photographs, tmp_path / "none", device="cpux"))
    with pytest.raises(ValueError, match="capture needs a CUDA device"):
        Trainer(config(photographs, tmp_path, capture=True))
    assert not (tmp_path / "none").exists()


# The variational bound


def test_variational_bound_of_a_gaussian_in_closed_form():
    schedule, v = Schedule.named(T=40, start=1e-4, end=0.3), 0.3
    torch.manual_seed(0)
    y_0 = torch.randn(4, 1, 128, 128) * math.sqrt(v)

    def optimal(x, y_t, level):  # E[eps given y_t], where y_0 ~ N(0, v)
        g = level.view(-1, 1, 1, 1).square()
        return (1 - g).sqrt() / (g * v + 1 - g) * y_t

    bound = training.variational_bound(optimal, None, y_0, schedule, seed=3)
    bits, n = 1 / math.log(2), y_0.numel()
    assert sorted(bound["kl"]) == list(range(2, 41))
    for t, kl in bound["kl"].items():
        a, g, before = (value.item() for value in (schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]))
        left = g * v / (g * v + 1 - g)  # the variance of eps given y_t
        ratio = (1 - before) / (1 - g)
        mean_error = (1 - a) / (a * (1 - g)) * left
        expected = bits * 0.5 * (ratio - 1 - math.log(ratio) + mean_error)
        assert abs(kl - expected) < 5 * bits * 0.5 * mean_error * math.sqrt(2 / n)
    g = schedule.gamma[-1].item()
    expected = bits * 0.5 * (g * y_0.double().square().mean().item() - g - math.log(1 - g))
    assert bound["prior"] == pytest.approx(expected, rel=1e-9)
    total = bound["prior"] + bound["decoder"] + sum(bound["kl"].values())
    assert bound["bits"] == pytest.approx(total, rel=1e-12)
    some = training.variational_bound(optimal, None, y_0, schedule, seed=3, steps=[5, 20])
    assert some["kl"] == {t: bound["kl"][t] for t in (5, 20)}


def test_bins_of_the_decoder_are_the_normal_distributions():
    y = (torch.tensor([0, 1, 100, 128, 254, 255]).double() / 255 * 2 - 1)[None]
    for mean, std in ((0.0, 0.1), (-1.0, 0.01), (0.99, 0.003)):
        edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255 * 2 - 1, [np.inf]])
        levels = [0, 1, 100, 128, 254, 255]
        upper, lower = ((edges[[i + d for i in levels]] - mean) / std for d in (1, 0))
        flip = lower > 0
        upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
        high, low = norm.logcdf(upper), norm.logcdf(lower)
        expected = high + np.log1p(-np.exp(low - high))
        got = training.log_bin(y, torch.full_like(y, mean), std)[0]
        assert torch.allclose(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    every = torch.linspace(-1, 1, 256, dtype=torch.float64)
    assert training.log_bin(every, torch.full_like(every, 0.37), 0.2).exp().sum().item() == pytest.approx(1)


# Janspiry's checkpoints as a start


def test_janspirys_optimizer_goes_on_as_adam_would(photographs, tmp_path):
    from sr3fast.compat import janspiry

    torch.manual_seed(0)
    model = training.fresh(config(photographs, tmp_path, dropout=0.0))
    theirs = {f"denoise_fn.{janspiry._their_name(n, 'sr3')}": p for n, p in model.unet.named_parameters()}
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
    unet, schedule = janspiry.load(tmp_path / "I1_E1_gen.pth", names)
    start = weights.Model(unet, schedule, scale=4)
    trainer = Trainer(config(photographs, tmp_path), start, janspiry.moments(tmp_path / "I1_E1_gen.pth"))
    gradients = {name: torch.randn_like(p) for name, p in trainer.unet.named_parameters()}
    for (name, mine), original in zip(trainer.unet.named_parameters(), model.unet.parameters(), strict=True):
        mine.grad, original.grad = gradients[name].clone(), gradients[name].clone()
    trainer.optimizer.param_groups[0]["lr"] = SMALL["lr"]
    trainer.optimizer.step()
    adam.step()
    for mine, original in zip(trainer.unet.parameters(), model.unet.parameters(), strict=True):
        assert torch.allclose(mine, original, rtol=1e-6, atol=1e-7)
