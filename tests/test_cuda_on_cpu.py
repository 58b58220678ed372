"""csrc/cuda on an emulated GPU: the kernels themselves, run by the CPU (cuda_on_cpu/emulate.h)."""

import contextlib
import os
import random as python_random
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, assert_as_exact_as_torch, nan_like, random, same_bits

from sr3fast import backend, ops

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="g++ is not installed")

# of emulate.h's table
CLUSTERS, NARROW_CLUSTERS, AMPERE, AMPERE_SMALL_L2, HOPPER, CLUSTERS_OF_2, NO_CLUSTERS, TAKEN = range(8)
ROW = (1.2, 0.7, 1.0, 0.9, -0.1, 0.3, 0.2, -0.4, 0.5)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_on_cpu.build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="module")
def functions(library):
    return cuda_on_cpu.Functions(library)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return cuda_on_cpu.Candidates(tmp_path_factory.mktemp("candidates"))


@pytest.fixture
def emulated(functions, monkeypatch):
    """with emulated(device, schedule, in_memory): the ops run there, threads in that order, scalars in memory."""

    @contextlib.contextmanager
    def use(device=CLUSTERS, schedule=cuda_on_cpu.FORWARD, in_memory=False):
        home = cuda_on_cpu.Home(functions, device)
        functions.schedule(schedule)
        functions.in_memory = in_memory
        with monkeypatch.context() as patch:
            patch.setattr(backend, "find", lambda op, device: getattr(home, op))
            yield functions

    return use


def guarded(shape, dtype, layout=torch.contiguous_format, offset=0):
    """A tensor inside NaN, its first element `offset` elements after a multiple of 16 bytes; and all of the memory."""
    n = torch.Size(shape).numel()
    memory = torch.full((n + 64,), float("nan"), dtype=dtype)
    inner = memory[32 + offset : 32 + offset + n]
    if layout is torch.channels_last:
        b, c, h, w = shape
        return inner.view(b, h, w, c).permute(0, 3, 1, 2), memory
    return inner.view(shape), memory


def assert_guard_is_whole(t, memory):
    n = t.numel()
    first = (t.data_ptr() - memory.data_ptr()) // t.element_size()
    assert memory[:first].isnan().all() and memory[first + n :].isnan().all()


def test_divide(functions):
    draw = python_random.Random(0)
    edges = [1, 2, 3, 4, 5, 7, 31, 641, 65535, 65536, (1 << 30) - 1, 1 << 30, (1 << 31) - 1]
    for d in edges + [draw.randrange(1, 1 << draw.randrange(1, 32)) for _ in range(300)]:
        for n in (0, 1, d - 1, d, 2 * d - 1, (1 << 31) - 1, draw.randrange(1 << 31)):
            n = min(n, (1 << 31) - 1)
            assert functions.quotient(n, d) == n // d, (n, d)


# ------------------------------------------------------------------------------------------- noise and steps

# rows that end inside a quad, quads at multiples of 4, channels_last, several launches (2^13 elements each)
STEP_SHAPES = [(2, 3, 8, 16), (3, 6, 33, 31), (2, 13, 6, 10), (1, 4, 1, 1), (2, 5, 3, 2), (1, 3, 64, 64), (3, 1, 7, 9)]


def steps(shape, layout, dtype, strides, origin):
    """Every op of this group once; outputs begin as NaN."""
    b, c, h, w = shape
    y = random(*shape, seed=1, layout=layout)
    eps_hat = random(*shape, seed=2, dtype=dtype)
    into = nan_like(eps_hat)
    if strides == "dense":
        eps_hat, into = (t.contiguous(memory_format=layout) for t in (eps_hat, into))
    else:  # some channels of a channels_last buffer, as a network's input and output are
        buffers = [torch.full((b, h, w, c + 5), float("nan"), dtype=dtype).permute(0, 3, 1, 2) for _ in range(2)]
        eps_hat, into = buffers[0][:, 2 : 2 + c].copy_(eps_hat), buffers[1][:, 1 : 1 + c]
    m1, m2 = random(*shape, seed=3), random(*shape, seed=4)
    seeds = [5, -7, 1 << 63][:b]
    out, m = nan_like(y), m2.contiguous(memory_format=layout).clone()
    ops.solver_step(y, eps_hat, ROW, seeds, 12, history=(m1, m), origin=origin, out=(out, m), into=into)
    solver_into = into.clone()
    in_place = y.clone(memory_format=torch.preserve_format)
    ops.refine(in_place, eps_hat, 0.9, 0.5, 123, 4, origin=origin, out=in_place, into=into)
    dense = eps_hat.contiguous(memory_format=layout)
    gamma = torch.linspace(0.1, 0.9, b, dtype=torch.float64)
    return (
        *(out, m, solver_into, in_place, into.clone()),
        ops.refine(y, eps_hat, 0.9, 0.5, 123, 1, origin=origin),
        ops.solver_step(y, eps_hat, ROW, None, 12, history=(m1, m2), z=m1)[0],
        ops.noise(shape, 3, step=9, origin=origin, dtype=dtype),
        *ops.q_sample(dense, gamma, 77, 5, origin=origin, out=(nan_like(dense), nan_like(dense)), into=nan_like(y)),
        ops.q_sample(dense, 0.25, None, eps=dense)[0],
    )


@pytest.mark.parametrize("origin", [(0, 0), (3, 8), (2, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
def test_steps_have_the_reference_bits(emulated, shape, layout, origin):
    for dtype in DTYPES:
        for strides in ("dense", "padded"):
            with backend.use("torch"):
                expected = steps(shape, layout, dtype, strides, origin)
            for in_memory in (False, True):
                with emulated(in_memory=in_memory):
                    actual = steps(shape, layout, dtype, strides, origin)
                for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
                    assert same_bits(a, b), (i, dtype, strides, in_memory)


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_keep_to_their_memory(emulated, layout, offset):
    """Tensors that start anywhere, in vectors where they may be."""
    shape = (2, 3, 8, 12)
    y, eps_hat = random(*shape, seed=1), random(*shape, seed=2)
    expected = []
    for dtype in DTYPES:
        y_in, y_memory = guarded(shape, torch.float32, layout, offset)
        f_in, f_memory = guarded(shape, dtype, layout, offset)
        out, out_memory = guarded(shape, torch.float32, layout, offset)
        into, into_memory = guarded(shape, dtype, layout, offset)
        y_in.copy_(y), f_in.copy_(eps_hat)
        with backend.use("torch"):
            expected = ops.refine(y_in, f_in, 0.9, 0.5, 123, 4)
        with emulated():
            ops.refine(y_in, f_in, 0.9, 0.5, 123, 4, out=out, into=into)
        assert same_bits(out, expected) and same_bits(into, expected.to(dtype))
        for t, memory in ((y_in, y_memory), (f_in, f_memory), (out, out_memory), (into, into_memory)):
            assert_guard_is_whole(t, memory)


# --------------------------------------------------------------------------------------------------- norms


def norm(shape, dtype, layout, groups, first=None):
    """Forward and backward of each kind, every output."""
    b, c = shape[:2]
    x = random(*shape, seed=1, mean=0.5, dtype=dtype, layout=layout).requires_grad_()
    residual = random(*shape, seed=2, dtype=dtype, layout=layout)
    weight, bias = random(c, seed=3).requires_grad_(), random(c, seed=4, dtype=dtype).requires_grad_()
    shift = random(b, c, seed=5).requires_grad_()
    grad = random(*shape, seed=6, dtype=dtype, layout=layout)
    leaves = (x, weight, bias, shift)
    pair = x
    if first is not None:
        pair = tuple(t.contiguous(memory_format=layout) for t in (x[:, :first], x[:, first:]))
    out = ops.group_norm_silu(pair, weight, bias, groups, shift=shift)
    out2, s = ops.add_group_norm_silu(x, residual, weight, bias, groups, shift=shift)
    grads = torch.autograd.grad(out, leaves, grad), torch.autograd.grad((out2, s), leaves, (grad, grad))
    return [t.detach() for t in (out, out2, s, *grads[0], *grads[1])]


@pytest.mark.parametrize("device", [CLUSTERS, AMPERE_SMALL_L2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "first"),
    [((2, 192, 8, 8), 32, 128), ((3, 6, 33, 31), 2, 1), ((2, 16, 64, 48), 4, None)],
    ids=str,
)
def test_norms_do_not_depend_on_the_order_of_threads(emulated, shape, groups, first, layout, device):
    for dtype in (torch.float32, torch.bfloat16):
        with emulated(device):
            expected = norm(shape, dtype, layout, groups, first)
        for schedule in (cuda_on_cpu.BACKWARD, cuda_on_cpu.SHUFFLED):
            with emulated(device, schedule):
                actual = norm(shape, dtype, layout, groups, first)
            assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True)), (dtype, schedule)


# shape, groups, layout, dtype, device: launches, largest cluster and grids of a forward and a backward
BF16, F32 = torch.bfloat16, torch.float32
NCHW, NHWC = LAYOUTS
WAYS = [
    ((1, 64, 32, 32), 32, NHWC, BF16, HOPPER, (1, 8, 0), (2, 16, 0)),  # blocks of 4 KB, to have many
    ((1, 64, 32, 32), 32, NCHW, BF16, HOPPER, (1, 1, 0), (2, 2, 0)),
    ((1, 8, 64, 64), 2, NHWC, F32, CLUSTERS, (1, 8, 0), (3, 1, 1)),  # 128 KB: small; 256 KB: a grid, and its totals
    ((1, 8, 64, 64), 2, NHWC, F32, CLUSTERS_OF_2, (1, 2, 0), (3, 1, 1)),
    ((1, 8, 32, 32), 2, NHWC, F32, CLUSTERS_OF_2, (1, 2, 0), (2, 2, 0)),
    ((1, 8, 128, 128), 2, NHWC, F32, CLUSTERS, (1, 1, 1), (4, 1, 0)),  # 1 MB is more than a grid keeps
    ((1, 4, 128, 128), 1, NHWC, F32, CLUSTERS_OF_2, (1, 1, 1), (3, 1, 1)),
    ((9, 64, 32, 32), 4, NHWC, BF16, CLUSTERS, (1, 1, 1), (3, 1, 1)),  # from slice to slice
    ((1, 8, 96, 96), 2, NHWC, F32, NO_CLUSTERS, (1, 1, 1), (3, 1, 1)),
    ((1, 8, 128, 128), 2, NHWC, F32, AMPERE, (1, 1, 1), (4, 1, 0)),  # less shared memory: a block a multiprocessor
    ((3, 4, 128, 128), 1, NCHW, F32, AMPERE, (1, 1, 1), (8, 1, 0)),  # L2 holds one sample of h and grad
    ((1, 8, 256, 256), 2, NHWC, F32, CLUSTERS, (2, 1, 0), (4, 1, 0)),
    ((2, 4, 256, 256), 1, NCHW, F32, CLUSTERS, (4, 1, 0), (6, 1, 0)),  # a sample at a time
    ((5, 16, 8, 8), 4, NHWC, F32, AMPERE_SMALL_L2, (1, 1, 0), (2, 1, 0)),  # a slice is small enough for a block
    ((1, 8, 96, 96), 2, NHWC, F32, TAKEN, (2, 1, 0), (4, 1, 0)),  # less of it is for this process
]


@pytest.mark.parametrize(("shape", "groups", "layout", "dtype", "device", "forward", "backward"), WAYS, ids=str)
def test_the_way_a_norm_goes(emulated, shape, groups, layout, dtype, device, forward, backward):
    x = random(*shape, seed=1, mean=0.5, dtype=dtype, layout=layout).requires_grad_()
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    with emulated(device) as functions:
        out = ops.group_norm_silu(x, weight, bias, groups)
        assert (functions.launches, functions.largest_cluster, functions.grids) == forward
    with emulated(device) as functions:
        dh, *_ = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
        assert (functions.launches, functions.largest_cluster, functions.grids) == backward

    def plain(h):
        out = F.silu(F.group_norm(h, groups))
        return out.detach(), torch.autograd.grad(out.sum(), h)[0]

    for actual, ours, exact in zip((out, dh), plain(x), plain(x.detach().double().requires_grad_()), strict=True):
        assert_as_exact_as_torch(actual.detach(), ours, exact)


def test_kernels_are_told_once_what_they_may_have(library, tmp_path):
    """And never less than before: another thread may be about to launch with more."""
    functions = cuda_on_cpu.Functions(shutil.copy(library, tmp_path))  # where no kernel ran yet
    home = cuda_on_cpu.Home(functions, HOPPER)
    told, asked = functions.told, functions.asked

    def run(size, dtype):
        h = random(1, 8, size, size, dtype=dtype, layout=NHWC)
        outs = torch.empty_like(h), torch.empty(1, 2), torch.empty(1, 2)
        home.group_norm_silu(outs, h, None, torch.ones(8), torch.zeros(8), 2, 1e-5, None, True)
        return functions.told - told, functions.asked - asked

    assert [run(size, F32) for size in (128, 64, 128)] == [(2, 1)] * 3  # much shared memory, less, much
    assert run(64, BF16) == (4, 2)  # another kernel of the same type


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norms_keep_to_their_memory(functions, layout, offset):
    """Tensors that start anywhere, in vectors where they may be."""
    shape, groups = (2, 16, 6, 8), 4
    home = cuda_on_cpu.Home(functions)
    for dtype in DTYPES:
        names = ("out", "s", "h", "residual", "grad", "dh")
        t = {name: guarded(shape, dtype, layout, offset) for name in names}
        for seed, name in enumerate(("h", "residual", "grad")):
            t[name][0].copy_(random(*shape, seed=seed))
        weight, bias, shift = random(16, seed=7), random(16, seed=8), random(2, 16, seed=9)
        sizes = ((2, 4), (2, 4), (16,), (16,), (2, 16))
        mean, rstd, dweight, dbias, dshift = (torch.full(n, float("nan")) for n in sizes)
        out, s, h, residual, grad, dh = (t[name][0] for name in names)
        parameters = (weight, bias, groups, 1e-5, shift, True)
        home.add_group_norm_silu((out, s, mean, rstd), h, residual, *parameters)
        home.group_norm_silu((out, mean, rstd), h, None, *parameters)
        outs = (dh, None, dweight, dbias, dshift)
        home.group_norm_silu_backward(outs, grad, h, None, weight, bias, mean, rstd, groups, shift, True, None)
        for tensor, memory in t.values():
            assert tensor.isfinite().all()
            assert_guard_is_whole(tensor, memory)
        assert all(v.isfinite().all() for v in (mean, rstd, dweight, dbias, dshift))


# ---------------------------------------------------------------------------------------------- the candidates


@pytest.mark.parametrize("schedule", [cuda_on_cpu.FORWARD, cuda_on_cpu.SHUFFLED])
@pytest.mark.parametrize(
    ("shape", "groups", "first"),
    [((2, 192, 8, 8), 32, 128), ((9, 64, 8, 16), 4, None), ((2, 16, 12, 20), 2, None), ((3, 8, 5, 7), 2, None)],
    ids=str,
)
def test_candidates(candidates, shape, groups, first, schedule):
    """bfloat16 in channels_last, with a shift; several samples a round, a sample in two."""
    b, c = shape[:2]
    h = random(*shape, seed=1, mean=0.5, dtype=BF16, layout=NHWC)
    pair = (h, None) if first is None else tuple(p.contiguous(memory_format=NHWC) for p in (h[:, :first], h[:, first:]))
    weight, bias, shift = random(c, seed=3, mean=1.0), random(c, seed=4), random(b, c, seed=5)
    grad = random(*shape, seed=6, dtype=BF16, layout=NHWC)
    mean, rstd = (torch.full((b, groups), float("nan")) for _ in range(2))
    out, (dh, dh2) = nan_like(h), (None if p is None else nan_like(p) for p in pair)
    dweight, dbias, dshift = nan_like(weight), nan_like(bias), nan_like(shift)
    norm = (*pair, None, weight, bias, shift, groups, 1e-5, True)
    candidates.forward((out, None, mean, rstd), norm, schedule)
    candidates.backward((dh, dh2, dweight, dbias, dshift, grad, None, mean, rstd), norm, schedule)

    def plain(h, weight, bias, shift, grad):
        leaves = tuple(t.detach().requires_grad_() for t in (h, weight, bias, shift))
        h, weight, bias, shift = leaves
        out = F.silu(F.group_norm(h + shift[:, :, None, None], groups, weight, bias))
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    actual = (out, dh if dh2 is None else torch.cat((dh, dh2), 1), dweight, dbias, dshift)
    inputs = (h, weight, bias, shift, grad)
    ours, exact = plain(*(t.to(BF16) for t in inputs)), plain(*(t.double() for t in inputs))
    for a, p, e in zip(actual, ours, exact, strict=True):
        assert_as_exact_as_torch(a.to(BF16), p, e)


# -------------------------------------------------------------------------------------------------- the rest


def test_errors_name_the_op_and_its_numbers(functions):
    home = cuda_on_cpu.Home(functions, 99)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(99\): invalid value"):
        home.noise((torch.empty(1, 1, 2, 2),), torch.tensor(0), torch.tensor(0), 0, (0, 0))
    home = cuda_on_cpu.Home(functions)
    h = torch.zeros(1, 2, 4, 4)
    ones, mean = torch.ones(2), torch.zeros(1, 1)
    outs = (h.clone(), None, ones.clone(), ones.clone(), None)
    home._norm_exec = lambda h, channels: ((0, AMPERE_SMALL_L2, 0, 0), None)
    with pytest.raises(RuntimeError, match="group_norm_silu_backward: Exec::scratch must point to scratch_bytes"):
        home.group_norm_silu_backward(outs, h, h, None, ones, ones, mean, mean, 1, None, True, None)


def test_a_block_without_room_for_its_part_leaves_it_to_two_kernels(emulated):
    h = random(1, 3072, 2, 2, dtype=BF16, layout=NHWC).requires_grad_()
    weight, bias = torch.ones(3072), torch.zeros(3072)
    with emulated(HOPPER) as functions:
        out = ops.group_norm_silu(h, weight, bias, 1)
        functions.schedule(cuda_on_cpu.FORWARD)
        out.sum().backward()
        assert functions.launches == 4 and h.grad.isfinite().all()


def test_a_group_of_too_many_channels_is_refused(emulated):
    h = random(1, 7992, 4, 4, dtype=BF16, layout=NHWC).requires_grad_()
    weight, bias = torch.ones(7992), torch.zeros(7992)
    with emulated(AMPERE):
        ops.group_norm_silu(h, weight, bias, 3).sum().backward()  # slices of 2664 channels
        assert h.grad.isfinite().all()
        out = ops.group_norm_silu(h, weight, bias, 1)
        with pytest.raises(
            RuntimeError, match=r"_backward: what .* must fit in 166912 bytes .*: got 479632 bytes for 7992 channels"
        ):
            out.sum().backward()


@pytest.mark.parametrize("device", [CLUSTERS, AMPERE_SMALL_L2])
def test_what_every_home_must_pass(library, device):
    """The shared tests of the ops, as `pytest -p cuda_on_cpu.plugin` runs them."""
    tests = Path(__file__).parent
    files = ["test_ops_norm.py"] if device != CLUSTERS else ["test_ops_norm.py", "test_ops_steps.py"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SR3FAST_EMULATED": str(library),
        "SR3FAST_EMULATED_DEVICE": str(device),
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "cuda-cpu",
        "-p",
        "cuda_on_cpu.plugin",
        *(tests / f for f in files),
    ]
    if sys.version_info < (3, 11):  # -P is new
        command.remove("-P")
    done = subprocess.run(command, env=environment, cwd=tests, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
