"""The engine: the same function in every form, fresh weights, separate runs, the captured step."""

import copy
import dataclasses
import gc
import importlib.util
import itertools
import math
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sr3fast import backend, contract, ops
from sr3fast.engine import Engine, Form, capture, gpu, winograd
from sr3fast.engine import run as engine_run
from sr3fast.engine.capture import Captures
from sr3fast.engine.convolution import packs, transposed_weight
from sr3fast.engine.engine import KEPT
from sr3fast.engine.tuned import Tuned, choosing
from sr3fast.sampler import Sampler, network
from sr3fast.schedule import Schedule
from sr3fast.unet import UNet

SMALL = {
    "channels": 16,
    "multipliers": (1, 2, 2),
    "blocks": 2,
    "attention": (8,),
    "groups": 4,
    "image_size": 32,
}
SCHEDULE = Schedule.named("linear", T=2000, start=1e-6, end=1e-2)
LEVELS = torch.tensor([0.1, 0.5, 0.9])
CPU = torch.device("cpu")
NAMES = [field.name for field in dataclasses.fields(Form)]
CUDA_FORM = dataclasses.replace(Form(), prepacked=False, winograd=False)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def unet(seed=0, **config):
    torch.manual_seed(seed)
    net = UNet(**{**SMALL, **config})
    for p in net.parameters():  # biases and norms that tell channels apart
        torch.nn.init.normal_(p, 0.0 if p.ndim > 1 else 0.3, 0.08 if p.ndim > 1 else 0.2)
    return net.eval()


def images(net, B=2, H=16, W=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    Cx = net.in_channels - net.out_channels
    x = torch.randn(B, Cx, H, W, generator=g) if Cx else None
    return x, torch.randn(B, net.out_channels, H, W, generator=g)


@torch.no_grad()
def plain(net, x, y, level):
    B = len(y)
    return net(x, y, level.expand(B) if net.variant == "ddpm" else level.expand(B, 1))


def run_once(f_theta, x, y, levels=LEVELS, i=1):
    run = f_theta.start_run(x, y.shape, levels)
    run.into.copy_(y)
    return run(i).clone()


def rms(t):
    return t.double().square().mean().sqrt().item()


@pytest.fixture
def on_cpu_as_on_cuda(monkeypatch):
    """What applies on a GPU, on the CPU: plain convolutions, sums in norms and products, padded channels."""
    monkeypatch.setattr(Form, "on", lambda form, *_: dataclasses.replace(form, prepacked=False, winograd=False))


# ---------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize(
    "form",
    [Form(), Form.none()]
    + [dataclasses.replace(Form(), **{name: False}) for name in NAMES]
    + [dataclasses.replace(Form.none(), **{name: True}) for name in NAMES],
    ids=["all", "none"] + [f"without {name}" for name in NAMES] + [f"only {name}" for name in NAMES],
)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
def test_every_form_is_the_network(form, gpu, request):
    if gpu:
        request.getfixturevalue("on_cpu_as_on_cuda")
        form = dataclasses.replace(
            form,
            late_bias=form.late_bias and form.fused_norms,
            no_cat=form.no_cat and form.fused_norms,
        )
    net = unet()
    x, y = images(net)
    expected = plain(net, x, y, LEVELS[1])
    assert (run_once(Engine(net, form=form), x, y) - expected).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        autocast = plain(net, x, y, LEVELS[1])
    half = run_once(Engine(net, torch.bfloat16, form), x, y)
    assert half.dtype == torch.bfloat16
    assert rms(half - expected) < 1.5 * rms(autocast - expected)


CONFIGS = {
    "unconditional": {"in_channels": 3},
    "many channels": {"in_channels": 13 + 4, "out_channels": 4},
    "ddpm": {"variant": "ddpm"},
    "one block": {"blocks": 1, "attention": ()},
    "one level": {"multipliers": (2,), "attention": (32,)},
    "attention everywhere": {"attention": (8, 16, 32)},
    "equal widths": {"multipliers": (1, 1, 1), "attention": (16,)},
    "three blocks": {"blocks": 3, "groups": 8},
    "wide": {"channels": 32, "multipliers": (1, 2)},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
def test_every_network(config, gpu, request):
    if gpu:
        request.getfixturevalue("on_cpu_as_on_cuda")
    net = unet(**config)
    x, y = images(net, B=3)
    levels = torch.tensor([1, 700, 1999]) if net.variant == "ddpm" else LEVELS
    run = Engine(net).start_run(x, y.shape, levels)
    for i in (2, 0, 1):
        run.into.copy_(y)
        assert (run(i) - plain(net, x, y, levels[i])).abs().max() < 1e-5


@pytest.mark.skipif(winograd.kernels() is None or not packs(torch.float32), reason="needs the C++ kernels and oneDNN")
def test_minimal_filtering_where_it_pays():
    net = unet(channels=32, multipliers=(1, 2))

    def weights(*sizes, **options):
        engine = Engine(net, **options)
        for size in sizes:
            run_once(engine, *images(net, 1, *size))
        return len(engine._packed)

    small, large = weights((16, 16)), weights((32, 32))
    assert 0 < small < large
    assert weights((16, 16), (32, 32), (32, 40)) == large  # shapes share them
    assert weights((8, 8)) == weights((128, 2)) == 0  # few tiles, thin ones
    assert weights((32, 32), dtype=torch.bfloat16) == 0
    assert weights((32, 32), form=dataclasses.replace(Form(), winograd=False)) == 0
    with backend.use("torch"):
        assert weights((32, 32)) == 0


@pytest.mark.skipif(winograd.kernels() is None, reason="needs the C++ kernels")
def test_a_forced_backend_is_heeded_by_what_was_kept(monkeypatch):
    net = unet(channels=32, multipliers=(1, 2))
    x, y = images(net)
    f_theta, calls = Engine(net), []
    real = type(winograd.kernels()).conv3x3
    monkeypatch.setattr(type(winograd.kernels()), "conv3x3", lambda *args: (calls.append(1), real(*args)))
    expected = run_once(f_theta, x, y)
    assert calls
    for _ in range(2):
        calls.clear()
        with backend.use("torch"):
            run_once(f_theta, x, y)
        assert not calls
        assert torch.equal(run_once(f_theta, x, y), expected) and calls


def test_bfloat16_and_float16_weights():
    net = unet()
    x, y = images(net)
    expected = plain(net, x, y, LEVELS[1])
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(net).to(dtype)
        out = run_once(Engine(low), x, y)
        assert out.dtype == dtype
        error = rms(plain(low, x.to(dtype), y.to(dtype), LEVELS[1]) - expected)
        assert rms(out - expected) < 1.5 * error


@pytest.mark.parametrize("size", [(40, 4), (4, 40), (4, 4), (40, 8)], ids=str)
@pytest.mark.parametrize("form", [Form(), Form.none()], ids=["all", "none"])
def test_narrow_pictures_in_bfloat16(form, size):
    """Memory that a convolution must not read holds NaN."""
    net = unet(channels=32, multipliers=(1, 2, 2))
    x, y = images(net, B=1, H=size[0], W=size[1])
    expected = plain(net, x, y, LEVELS[1])
    engine = Engine(net, torch.bfloat16, form)
    for _ in range(3):
        for log in range(8, 20):
            torch.full((1 << log,), math.nan)  # is freed
        got = run_once(engine, x, y).float()
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_upsampling_as_one_transposed_convolution():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, 6, 7, dtype=torch.float64, generator=g)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=g)
    expected = F.conv2d(F.interpolate(h, scale_factor=2.0, mode="nearest"), weight, padding=1)
    out = F.conv_transpose2d(h, transposed_weight(weight), stride=2, padding=1)
    assert (out - expected).abs().max() < 1e-13


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "sr3"])
def test_trajectories(solver):
    """25 steps, every state: float32 as near as another layout is, bfloat16 within 1.5 of autocast; over 8 pictures,
    since the error of one is mostly that of its mean, a single number."""
    net = unet(blocks=1)
    x, _ = images(net, B=8, W=16)
    turned = copy.deepcopy(net).to(memory_format=torch.channels_last)

    def states(f_theta, **options):
        return [y for _, y in Sampler(f_theta, SCHEDULE, steps=25, solver=solver, **options).iterate(x)]

    def autocast(x, y, level):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x, y, level)

    exact = states(lambda x, y, level: net(x, y, level))
    rounded = states(lambda x, y, level: turned(x, y.to(memory_format=torch.channels_last), level))
    runs = (states(net), rounded, states(net, dtype=torch.bfloat16), states(autocast))
    for y, ours, other, half, low in zip(exact, *runs, strict=True):
        assert rms(ours - y) < 4 * rms(other - y) + 1e-7
        assert rms(half - y) < 1.5 * rms(low - y)


def test_what_is_outside_changes_nothing():
    net = unet(dropout=0.5).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = images(net)
    f_theta = Engine(net)
    expected = run_once(f_theta, x, y)
    assert (expected - plain(net.eval(), x, y, LEVELS[1])).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_once(f_theta, x, y), expected)
    with torch.inference_mode():
        assert torch.equal(run_once(Engine(net), x, y), expected)
        again = Engine(net)
        run_once(again, x, y)
    assert torch.equal(run_once(again, x, y), expected)  # what was made in inference mode works outside
    assert not run_once(f_theta, x.requires_grad_(), y).requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---------------------------------------------------------------------------------- fresh weights


def optimizer_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def average(net):
    for p in net.parameters():
        p.data.mul_(0.9).add_(0.01)


def exchange(net):
    net.conv_out.weight = torch.nn.Parameter(net.conv_out.weight.detach() * 2)


def load(net):
    net.load_state_dict(unet(seed=5).state_dict())


@pytest.mark.parametrize("change", [optimizer_step, average, exchange, load])
def test_changed_weights_are_noticed(change):
    net = unet()
    x, y = images(net)
    f_theta = Engine(net)
    before = run_once(f_theta, x, y)
    kept = f_theta._idle[0]
    assert torch.equal(run_once(f_theta, x, y), before) and f_theta._idle[0] is kept
    change(net)
    after = run_once(f_theta, x, y)
    assert (after - plain(net, x, y, LEVELS[1])).abs().max() < 1e-5 * after.abs().max().clamp(min=1)
    assert (after - before).abs().max() > 1e-3


def test_repack_for_a_change_that_cannot_be_seen():
    net = unet()
    x, y = images(net)
    f_theta = Engine(net)
    run = f_theta.start_run(x, y.shape, LEVELS)
    run.into.copy_(y)
    before = run(1).clone()
    for parameter in net.parameters():
        parameter.data.view(-1)[1:].mul_(2)
    f_theta.repack()
    expected = plain(net, x, y, LEVELS[1])
    assert (run_once(f_theta, x, y) - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    assert torch.equal(run(1), before) and (before - expected).abs().max() > 1e-3  # a run keeps what it began with
    del run
    gc.collect()
    assert (run_once(f_theta, x, y) - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


def test_a_changed_norm_is_noticed():
    net = unet()
    x, y = images(net)
    f_theta = Engine(net)
    run_once(f_theta, x, y)
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.eps = 0.5
    assert (run_once(f_theta, x, y) - plain(net, x, y, LEVELS[1])).abs().max() < 1e-5


# ---------------------------------------------------------------------------------- separate runs


@pytest.mark.parametrize("channels", [16, 32])
def test_runs_interleave(channels):
    net = unet(channels=channels)
    (x1, y1), (x2, y2) = images(net, seed=1), images(net, seed=2)
    f_theta = Engine(net)
    first, second = f_theta.start_run(x1, y1.shape, LEVELS), f_theta.start_run(x2, y2.shape, LEVELS.flip(0))
    first.into.copy_(y1)
    second.into.copy_(y2)
    assert (first(0) - plain(net, x1, y1, LEVELS[0])).abs().max() < 1e-5
    assert (second(0) - plain(net, x2, y2, LEVELS[2])).abs().max() < 1e-5
    assert (first(0) - plain(net, x1, y1, LEVELS[0])).abs().max() < 1e-5
    x1.zero_()
    assert first.x.abs().max() > 0  # x was copied into the input
    assert torch.equal(second.x, x2)


@pytest.mark.parametrize("channels", [16, 32])
def test_threads(channels):
    net = unet(channels=channels)
    f_theta = Engine(net)
    pictures = [images(net, seed=s) for s in range(6)]
    expected = [plain(net, x, y, LEVELS[1]) for x, y in pictures]
    failures = []

    def work(k):
        for _ in range(3):
            if (run_once(f_theta, *pictures[k]) - expected[k]).abs().max() > 1e-5:
                failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_few_shapes_are_kept():
    net = unet()
    f_theta = Engine(net)
    for k in range(KEPT + 2):
        x, y = images(net, B=1, H=8, W=8 * (k + 1))
        assert (run_once(f_theta, x, y) - plain(net, x, y, LEVELS[1])).abs().max() < 1e-5
    assert [n.shape[3] for n in f_theta._idle] == [8 * (k + 3) for k in range(KEPT)]


def test_copies():
    net = unet()
    x, y = images(net)
    f_theta = Engine(net)
    expected = run_once(f_theta, x, y)
    other = copy.deepcopy(f_theta)
    assert torch.equal(run_once(other, x, y), expected)
    assert other.unet is not net


# ---------------------------------------------------------------------------------- the sampler's part


def test_the_sampler_takes_the_engine_for_our_unet_only():
    net = unet()
    assert isinstance(network(net), Engine)
    assert network(net, torch.bfloat16).dtype == torch.bfloat16

    class Other(UNet):
        pass

    hooked, replaced, exchanged, circular, dilated = unet(), unet(), unet(), unet(), unet()
    hooked.mid[0].register_forward_hook(lambda *args: None)
    replaced.forward = lambda x, y_t, level: y_t
    exchanged.conv_out = torch.nn.Sequential(exchanged.conv_out)
    circular.conv_in.padding_mode = "circular"
    dilated.mid[0].conv1.dilation = dilated.mid[0].conv1.padding = (2, 2)
    for f_theta, reason in (
        (Other(**SMALL), "got Other"),
        (hooked, "hook of mid.0"),
        (replaced, "forward of the network was replaced"),
        (exchanged, "got Sequential as conv_out"),
        (circular, "the engine's conv_in has padding_mode='zeros': got 'circular'"),
        (dilated, r"the engine's mid.0.conv1 has padding=\(1, 1\): got \(2, 2\)"),
        (F.silu, "got function"),
    ):
        assert not isinstance(network(f_theta), Engine)
        with pytest.raises(TypeError, match=reason):
            Engine(f_theta)


def test_errors():
    net = unet()
    x, y = images(net)
    with pytest.raises(TypeError, match="dtype must be"):
        Engine(net, torch.float64)
    with pytest.raises(ValueError, match="graph must be"):
        Engine(net, graph="yes")
    with pytest.raises(ValueError, match=r"graph=True captures a CUDA graph: got weights on cpu"):
        Engine(net, graph=True).start_run(x, y.shape, LEVELS)
    f_theta = Engine(net)
    for arguments, message in (
        ((None, y.shape, LEVELS), "x is missing"),
        ((x, (2, 3, 18, 24), LEVELS), "multiples of"),
        ((x[:1], y.shape, LEVELS), "the size of y_t"),
        ((x, (2, 4, 16, 24), LEVELS), r"y_t must be \[B, 3"),
        ((x, (3, 16, 24), LEVELS), "shape must be that of y_t"),
        ((x, y.shape, LEVELS[:0]), "N at least 1"),
        ((x, y.shape, torch.tensor([1, 2])), "floating-point"),
        ((x.to("meta"), y.shape, LEVELS), "x must be where the weights are, on cpu: got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            f_theta.start_run(*arguments)
    assert not f_theta._idle
    assert "Engine(UNet" in repr(f_theta)


def test_layers_that_are_patched_or_hooked_later_are_refused():
    """A patched layer makes another function: the engine must not compute the old one without a word."""
    net = unet()
    x, y = images(net)
    f_theta = Engine(net)
    f_theta.start_run(x, y.shape, LEVELS)
    net.conv_out.forward = torch.zeros_like
    with pytest.raises(TypeError, match=r"the forward of conv_out was replaced.*a Sampler made of it now calls it"):
        f_theta.start_run(x, y.shape, LEVELS)
    assert not isinstance(network(net), Engine)
    del net.conv_out.forward
    f_theta.start_run(x, y.shape, LEVELS)
    net.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="a hook of conv_in would not run in the engine"):
        f_theta.start_run(x, y.shape, LEVELS)


# ---------------------------------------------------------------------------------- the captured step
# Without a GPU: a graph that calls what it recorded, and CUDA's calls as a list.


class Replayed:
    """As a CUDA graph: the same body on the same tensors, and nothing from the host."""

    def __init__(self, body):
        self.body = body

    def replay(self):
        with Recorder() as recorder:
            self.body()
        self.record = recorder.ops


class Recorder(TorchDispatchMode):
    """Refuses what a capture cannot have: values on the host, copies from or to it."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal"), name
        assert name != "_to_copy" or "device" not in (kwargs or {}), "a copy between devices"
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def captured(monkeypatch, on_cpu_as_on_cuda):
    """Engines replay on the CPU; gives the list of their graphs."""
    graphs = []

    def replayed(self, device, body, reset):
        for _ in range(3):  # as the runs before a capture: they spoil the state
            reset()
            body()
        graphs.append(Replayed(body))
        return graphs[-1]

    def start_run(self, x, shape, levels):
        eager = real(self, x, shape, levels)
        if type(eager) is engine_run.CapturedRun or self.graph is False:
            return eager
        captured = engine_run.CapturedRun(eager.network, levels, self._captures)
        captured.eager = eager  # its end gives the network back
        return captured

    real = Engine.start_run
    monkeypatch.setattr(Engine, "start_run", start_run)
    monkeypatch.setattr(Captures, "capture", replayed)
    monkeypatch.setattr(Captures, "turn", lambda self, device: self.lock)
    for module in (ops, contract):
        monkeypatch.setattr(module, "is_readable", lambda t: False)  # as if it were on the GPU
    monkeypatch.setattr(engine_run, "ROWS", 8)
    return graphs


OPTIONS = [
    {"solver": "sr3"},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "dpm++2m"},
    {"solver": "sde-dpm++2m"},
    {"solver": "unipc2"},
    {"solver": "unipc2", "corrector_steps": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(map(str, o.values())))
def test_a_captured_step_is_the_step(options, captured):
    net = unet()
    x, _ = images(net)
    expected = list(Sampler(Engine(net, graph=False), SCHEDULE, steps=6, **options).iterate(x, 3))
    assert not captured
    sampler = Sampler(Engine(net), SCHEDULE, steps=6, **options)
    estimates = []
    for (_, y), (_, y_2) in zip(
        expected, sampler.iterate(x, 3, callback=lambda *args: estimates.append(args)), strict=True
    ):
        assert torch.equal(y, y_2)
    assert len(captured) == 1
    assert torch.equal(sampler(x, 3), expected[-1][1])
    assert torch.equal(estimates[-1][1], expected[-1][1])
    assert estimates[0][2].abs().max() > 0


def test_one_graph_a_shape_whatever_else_changes(captured):
    net = unet()
    x, y = images(net)
    f_theta = Engine(net)
    graph_free = Engine(net, graph=False)
    for steps, seed, solver in ((5, 0, "ddim"), (7, 2**63 + 5, "unipc2"), (3, [4, 9], "sr3")):
        a = Sampler(f_theta, SCHEDULE, steps=steps, solver=solver)(x, seed)
        assert torch.equal(a, Sampler(graph_free, SCHEDULE, steps=steps, solver=solver)(x, seed))
        x = x.flip(0)
    assert len(captured) == 1
    Sampler(f_theta, SCHEDULE, steps=9)(x)  # more rows than it has room for
    assert len(captured) == 2
    Sampler(f_theta, SCHEDULE, steps=4)(x[:1])  # another shape
    assert len(captured) == 3
    assert (run_once(f_theta, x, y) - plain(net, x, y, LEVELS[1])).abs().max() < 1e-5  # the network alone
    assert len(captured) == 4


def test_what_is_no_longer_used_is_freed_at_once(captured):
    """The garbage collector does not know that a GPU's memory is short."""
    net = unet()
    x, y = images(net)
    Sampler(Engine(net), SCHEDULE, steps=3)(x)  # what torch imports at a first call keeps frames
    f_theta = Engine(net)
    gc.collect()
    gc.disable()
    try:
        run = f_theta.start_run(x, y.shape, LEVELS)
        loop = run.loop(y, Sampler(net, SCHEDULE, steps=3).table.rows, torch.tensor([1, 2]))
        graph, used = weakref.ref(run.graph), weakref.ref(run.network)
        run.graph.graphs.clear()  # the recordings hold the graph, as CUDA's do not
        captured.clear()
        del run
        assert not f_theta._idle  # the loop is the run's
        del loop
        Sampler(f_theta, SCHEDULE, steps=9)(x)  # more rows than it has room for
        assert graph() is None and f_theta._idle == [used()]
        graph = weakref.ref(used().graph)
        graph().graphs.clear()
        captured.clear()
        f_theta.repack()
        assert graph() is None and used() is None
    finally:
        gc.enable()


def test_the_captured_step_allocates_no_state_and_asks_the_host_nothing(captured):
    net = unet()
    x, y = images(net)
    run = Engine(net).start_run(x, y.shape, LEVELS)
    rows = Sampler(net, SCHEDULE, steps=3).table.rows
    step = run.loop(y, rows, torch.tensor([1, 2]))
    graph = run.graph
    state = ("y", "m", "m1", "m2", "table_row", "row", "counter", "step", "seeds", "eps_hat", "keep")
    where = [getattr(graph, name).data_ptr() for name in state] + [
        run.into.data_ptr(),
        run.network.shifts.data_ptr(),
    ]
    untouched = y.clone()
    records = []
    for i in range(3):
        assert graph.counter.item() == i and graph.step.item() == 3 - i
        y_i, m = step(i)
        assert y_i is graph.y and m is graph.m
        assert torch.equal(run.into, graph.y)
        records.append(captured[-1].record)
    assert records[0] == records[1] == records[2]  # the same work for every row
    assert torch.equal(y, untouched)
    assert where == [getattr(graph, name).data_ptr() for name in state] + [
        run.into.data_ptr(),
        run.network.shifts.data_ptr(),
    ]
    assert records[0].count("sr3fast.solver_step_out.default") == 1
    assert not [name for name in records[0] if name.startswith(("aten.cat", "aten.silu", "aten.upsample"))]


def test_the_recorder_refuses_the_host():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Recorder():
        torch.ones(1).item()


class FakeCuda:
    """torch.cuda's part in a capture, as a list of what was called."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.now = FakeStream(self, "current")
        streams, pools = itertools.count(1), itertools.count(1)
        for name, value in {
            "current_stream": lambda device=None: self.now,
            "Stream": lambda device=None: FakeStream(self, f"side {next(streams)}"),
            "stream": lambda stream: self.context("stream", stream.name),
            "device": lambda device: self.context("device", device),
            "CUDAGraph": lambda: "graph",
            "graph": lambda graph, pool, stream, capture_error_mode: self.context(
                "capture", stream.name, capture_error_mode, gc.isenabled(), pool
            ),
            "graph_pool_handle": lambda: f"pool {next(pools)}{self.note('pool')}",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def note(self, *call):
        self.calls.append(call)
        return ""

    def context(self, *call):
        cuda = self

        class Context:
            def __enter__(self):
                cuda.note(*call)

            def __exit__(self, *error):
                cuda.note("end", call[0])

        return Context()


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.note("wait", self.name, other.name)


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_may_be_chosen_by_its_time_in_a_capture(monkeypatch, deterministic):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    seen = set()
    body = lambda: seen.add((choosing.get(), torch.backends.cudnn.benchmark))  # noqa: E731
    Captures().capture(CPU, body, lambda: None)
    assert seen == {(not deterministic, not deterministic)}
    assert not choosing.get()


def test_how_a_step_is_captured(monkeypatch):
    captures = Captures()
    cuda = FakeCuda(monkeypatch)
    benchmark, collecting = torch.backends.cudnn.benchmark, gc.isenabled()
    assert captures.capture(CPU, lambda: cuda.note("body"), lambda: cuda.note("reset")) == "graph"
    assert cuda.calls == [
        ("device", torch.device("cpu")),
        ("pool",),
        ("wait", "side 1", "current"),
        ("stream", "side 1"),
        *[("reset",), ("body",)] * 3,
        ("end", "stream"),
        ("wait", "current", "side 1"),
        ("capture", "side 1", "thread_local", False, "pool 1"),
        ("body",),
        ("end", "capture"),
        ("wait", "current", "side 1"),
        ("end", "device"),
    ]
    assert gc.isenabled() == collecting and torch.backends.cudnn.benchmark == benchmark

    def body():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match=r"could not be captured as a CUDA graph \(operation not permitted"):
        captures.capture(CPU, body, lambda: None)
    assert gc.isenabled() == collecting and torch.backends.cudnn.benchmark == benchmark

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("no memory")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="no memory"):
        captures.capture(CPU, out_of_memory, lambda: None)
    captures.capture(CPU, lambda: None, lambda: None)
    # the pool of a failed capture is not used again
    assert [c[4] for c in cuda.calls if c[0] == "capture"] == ["pool 1", "pool 3"]


def test_replays_wait_for_one_another_across_streams(monkeypatch):
    captures = Captures()
    cuda = FakeCuda(monkeypatch)
    for name in ("a", "a", "b", "a"):
        cuda.now = streams[name] if name in (streams := getattr(cuda, "known", {})) else FakeStream(cuda, name)
        cuda.known = {**streams, name: cuda.now}
        with captures.turn(CPU):
            cuda.note("replay", name)
    assert cuda.calls == [
        ("replay", "a"),
        ("replay", "a"),
        ("wait", "b", "a"),
        ("replay", "b"),
        ("wait", "a", "b"),
        ("replay", "a"),
    ]


# ---------------------------------------------------------------------------------- the Triton kernels
# TRITON_INTERPRET is read when a kernel is decorated: another process runs the engine as on a GPU, with the kernels in
# Triton's interpreter (`python test_engine.py RESULTS`).

TINY = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,), "groups": 4, "image_size": 16}


def as_on_a_gpu(graph):
    """The engine's results, layer by layer or as the capture has them, by name; and what was launched."""
    from sr3fast import kernels

    launched = []
    for module, name in ((kernels.conv, "conv2d"), (kernels.conv, "add"), (kernels.attention, "attention")):
        real = getattr(module, name)
        setattr(module, name, lambda *args, f=real, n=name: (launched.append(n), f(*args))[1])
    Form.on = lambda form, device, dtype: dataclasses.replace(form, prepacked=False, winograd=False)
    gpu.kernels = lambda device: kernels
    gpu.processors = lambda device: 1
    kernels.conv.plan = lambda M, N, channels, *_: kernels.conv.Plan(64, 32, 32, 4, 2, 1 + len(channels))
    turns = iter([2.0, 1.0] * 1000)
    gpu.time_of = lambda device, calls: (calls[0](), next(turns))[1]
    Tuned.choices.clear()
    choosing.set(graph)
    found = {}
    for dtype, B, late_bias in itertools.product((torch.float32, torch.bfloat16), (1, 2), (True, False)):
        net = unet(**TINY)
        x, y = images(net, B=B, H=8, W=8)
        launched.clear()
        out = run_once(Engine(net, dtype, dataclasses.replace(Form(), late_bias=late_bias)), x, y)
        found[f"{dtype} {B} {late_bias}"] = out, sorted(set(launched))
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_are_the_network(tmp_path):
    path = tmp_path / "results.pt"
    search = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(path, weights_only=True)
    for dtype, B, late_bias in itertools.product((torch.float32, torch.bfloat16), (1, 2), (True, False)):
        net = unet(**TINY)
        x, y = images(net, B=B, H=8, W=8)
        expected = plain(net, x, y, LEVELS[1])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = plain(net, x, y, LEVELS[1])
        for graph in (False, True):
            out, launched = found[graph][f"{dtype} {B} {late_bias}"]
            low = dtype == torch.bfloat16
            assert set(launched) == {"add", *(["attention"] if low else []), *(["conv2d"] if low and graph else [])}
            if low:
                assert rms(out - expected) < 1.5 * rms(autocast - expected)
            else:
                assert (out - expected).abs().max() < 1e-5


def test_a_triton_that_cannot_compile_is_told_and_left_out(monkeypatch):
    def add(*tensors):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backend, "load", lambda home: SimpleNamespace(conv=SimpleNamespace(add=add)))
    with pytest.warns(UserWarning, match="goes without its Triton kernels.*Failed to find C compiler"):
        assert not gpu.compiles.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(gpu, "compiles", lambda device: False)
    assert gpu.kernels(torch.device("cuda")) is None


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def exact_cudnn(monkeypatch):
    """No TF32; and no algorithm of cuDNN that adds by atomics, whose results differ from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype, exact_cudnn):
    net = unet().cuda()
    x, _ = (t.cuda() for t in images(net))
    for options in OPTIONS:
        graph = Sampler(Engine(net, dtype), SCHEDULE, steps=6, **options)
        eager = Sampler(Engine(net, dtype, graph=False), SCHEDULE, steps=6, **options)
        for (_, a), (_, b) in zip(graph.iterate(x, 1), eager.iterate(x, 1), strict=True):
            if dtype == torch.float32:
                assert (a - b).abs().max() < 1e-4
            else:  # by other kernels, which round elsewhere: two forms of the engine on a CPU are up to 0.018 apart
                assert rms(a - b) < 0.05 * rms(b)
        side = torch.cuda.Stream()
        f_theta = graph._network
        captured = f_theta._idle[0].graph.graphs["step"]
        with torch.cuda.stream(side):
            again = graph(x, 1)
        side.synchronize()
        assert torch.equal(again, graph(x, 1))
        assert [n.graph.graphs["step"] for n in f_theta._idle] == [captured]  # on both streams


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_tuned_on_a_gpu(batch, exact_cudnn, monkeypatch):
    """Every convolution by its plan, whichever is faster: the network to rounding, the same bits at each replay."""
    if isinstance(refused := backend.load("triton"), str):
        pytest.skip(refused)
    assert gpu.kernels(torch.device("cuda")) is not None
    net = unet(channels=64, multipliers=(1, 2, 4), groups=32).cuda()
    x, y = (t.cuda() for t in images(net, B=batch, H=32, W=32))
    levels = LEVELS.cuda()
    expected = plain(net, x, y, levels[1])
    with torch.autocast("cuda", torch.bfloat16):
        autocast = plain(net, x, y, levels[1])
    monkeypatch.setattr(Tuned, "choices", {})
    run_once(Engine(net, torch.bfloat16), x, y, levels)
    assert not Tuned.choices  # torch is asked to be deterministic
    monkeypatch.setattr(capture, "asked_to_be_deterministic", lambda: False)
    measured = run_once(Engine(net, torch.bfloat16), x, y, levels)
    assert len(Tuned.choices) > 10
    assert rms(measured - expected) < 1.5 * rms(autocast - expected)

    times = itertools.cycle([2.0, 1.0])
    monkeypatch.setattr(Tuned, "choices", {})
    monkeypatch.setattr(gpu, "time_of", lambda device, calls: (calls[0](), next(times))[1])
    f_theta = Engine(net, torch.bfloat16)
    out = run_once(f_theta, x, y, levels)
    planned = [plan for plan in Tuned.choices.values() if plan is not None]
    assert len(planned) > 10 and any(plan.split > 1 for plan in planned)
    assert rms(out - expected) < 1.5 * rms(autocast - expected)
    assert not torch.equal(out, run_once(Engine(net, torch.bfloat16, graph=False), x, y, levels))  # it is another way
    for _ in range(20):
        assert torch.equal(run_once(f_theta, x, y, levels), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save([as_on_a_gpu(graph) for graph in (False, True)], sys.argv[1])
