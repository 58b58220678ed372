"""kernels/ in Triton's interpreter, on the CPU: the other homes' bits; all else as exact as plain torch.

TRITON_INTERPRET is read when a kernel is decorated, so one other process computes everything
(`python test_triton_interpreter.py RESULTS`), and the tests compare. All that every home
must pass takes minutes there: `TRITON_INTERPRET=1 pytest tests -k triton`.
"""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, assert_as_exact_as_torch, nan_like, random, same_bits
from test_ops_norm import data, double, gradients, leaves, plain, plain_add, split, upstreams
from test_ops_steps import ROWS, STRIDES, strided

from sr3fast import backend, ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

KNOWN = json.loads((Path(__file__).parent / "data" / "noise_v1_kat.json").read_text())
BOTH = ((3, 6, 33, 31), (1, 3, 512, 512))
EVERYTHING = ROWS["everything"]


# ----------------------------------------------------------- the cases: tensors that any home makes, by name


def whole():
    """Noise, and refine of whole images, in tiles as large as an image."""
    for shape in BOTH:
        yield f"{shape}", lambda s=shape: ops.noise(s, 77, step=12)
        y, f, *_ = tensors(shape)
        yield f"refine {shape}", lambda y=y, f=f: ops.refine(y, f, 0.999, 0.4, 11, 1999)
    yield "a million", lambda: ops.noise((1, 4, 512, 512), 78, step=3)
    small = (2, 3, 9, 14)
    for dtype, origin in itertools.product(DTYPES, ((0, 0), (5, 3), (129, 4098))):
        yield f"{dtype} {origin}", lambda d=dtype, o=origin: ops.noise(small, 5, dtype=d, origin=o)
    seeds = [2**64 - 1, 7]
    for name, seed in {
        "int": 2**64 - 1, "ints": seeds, "tensor": torch.tensor([-1, 7]), "number": torch.tensor(1 << 62),
    }.items():  # fmt: skip
        yield f"seed, {name}", lambda s=seed: ops.noise(small, s, domain=2, step=2**32 - 1)
    yield "step, tensor", lambda: ops.noise(small, 5, step=torch.tensor(2**32 - 1))
    for i, known in enumerate(KNOWN["at"]):
        if known["c"] <= 1000:  # others take long
            yield f"known {i}", lambda k=known: at(k)
    for i, known in enumerate(KNOWN["images"]):
        yield f"known image {i}", lambda k=known: image(k)


def at(known):
    shape, origin = (1, known["c"] + 1, 1, 4), (known["h"], 4 * known["w4"])
    return ops.noise(shape, known["seed"], domain=known["domain"], step=known["step"], origin=origin)[0, -1, 0]


def image(known):
    place = {k: known[k] for k in ("domain", "step", "origin")}
    return ops.noise((1, *known["shape"]), known["seed"], **place).flatten()


def tensors(shape, layout=torch.contiguous_format, dtype=torch.float32):
    """y, eps_hat, m_{t+1}, m_{t+2}."""
    y, m1, m2 = (random(*shape, seed=s, layout=layout) for s in (1, 3, 4))
    return y, random(*shape, seed=2, dtype=dtype, layout=layout), m1, m2


def steps():
    """refine, solver_step and q_sample once; what out= and into= receive begins as NaN."""
    # a lane's elements lie in each way that kernels/pixels.py names; rows end inside a quad, quads are cut
    nchw, nhwc = LAYOUTS
    for channels, layout, width, origin, dtypes in (
        *((3, nchw, 31, (3, 5), DTYPES), (3, nchw, 32, (2, 8), DTYPES)),
        *((3, nhwc, 31, (3, 5), DTYPES), (3, nhwc, 32, (2, 8), DTYPES)),
        *((c, nhwc, 31, (0, 0), DTYPES[2:]) for c in (1, 2, 4, 6, 8)),
        *((c, nhwc, 32, (1, 4), DTYPES[2:]) for c in (1, 2, 4, 6, 8)),
    ):
        for dtype in dtypes:
            given = ((2, channels, 9, width), layout, dtype)
            yield f"{given} {origin}", lambda g=given, o=origin: one_of_each(*g, o)
    buffers = [("channels of a buffer", dtype) for dtype in DTYPES]
    for how, dtype in (*((how, torch.bfloat16) for how in STRIDES if how != buffers[0][0]), *buffers):
        yield f"{how} {dtype}", lambda h=how, d=dtype: between_buffers(h, d)
    for name, row in ROWS.items():
        y, f, m1, m2 = tensors((1, 3, 9, 37))
        yield f"row {name}", lambda r=row, t=(y, f), m=(m1, m2): ops.solver_step(*t, r, 3, 2, history=m)
        yield f"row {name} in place", lambda r=row: in_place(r)


def one_of_each(shape, layout, dtype, origin):
    y, f, m1, m2 = tensors(shape, layout, dtype)
    out, m, into, eps = nan_like(y), nan_like(y), nan_like(f), nan_like(f)
    ops.solver_step(y, f, EVERYTHING, [5, -7], 12, history=(m1, m2), origin=origin, out=(out, m), into=into)
    diffused = ops.q_sample(f, 0.3, 77, 5, origin=origin, out=(nan_like(f), eps))
    return out, m, into, *diffused, ops.refine(y, f, 0.9, 0.5, 123, 4, origin=origin)


def between_buffers(how, dtype):
    y, f, m1, m2 = tensors((1, 3, 9, 37), dtype=dtype)
    into, into_2 = strided(torch.zeros_like(f), how), strided(torch.zeros_like(f), how)
    out, _ = ops.solver_step(y, strided(f, how), EVERYTHING, 3, 2, history=(m1, m2), into=into)
    y_t, eps = ops.q_sample(y, 0.3, 3, 2, into=into_2)
    # what lies between into's elements stays NaN
    buffers = [t if t._base is None else t._base for t in (into, into_2)]
    return out, y_t, eps, *(t.clone() for t in (into, into_2)), *(t.isnan().float() for t in buffers)


def in_place(row):
    y, f, m1, m2 = tensors((1, 3, 9, 37))
    ops.solver_step(y, f, row, 3, 2, history=(m1, m2), out=(y, m2))
    refined, diffused = random(1, 3, 9, 37, seed=8), random(1, 3, 9, 37, seed=9)
    ops.refine(refined, f, 0.9, 0.5, 3, 4, out=refined)
    ops.q_sample(diffused, 0.25, 5, out=diffused)
    return y, m2, refined, diffused


def scalars():
    """Python numbers, tensors on the host, and tensors that the kernel reads: step 1 and another."""
    y, f, m1, m2 = tensors((3, 3, 9, 14))
    number = lambda value, dtype=torch.float64: torch.tensor(value, dtype=dtype)  # noqa: E731
    out = lambda: nan_like(y)  # noqa: E731
    for step in (1, 7):
        for seed in (2**64 - 1, [1 << 63, 5, 2**64 - 1]):
            # out= sends numbers to the home as they are, without it they come as tensors
            yield (
                f"numbers {step} {seed}",
                lambda t=step, s=seed: (
                    ops.noise(y.shape, s, step=t),
                    ops.refine(y, f, 0.97, 0.4, s, t, out=out()),
                    ops.solver_step(y, f, EVERYTHING, s, t, history=(m1, m2), out=out())[0],
                    *ops.q_sample(y, 0.3, s, t, out=(out(), out())),
                    ops.refine(y, f, 0.97, 0.4, None, t, z=m1),
                ),
            )
            held = number([s - (s >> 63 << 64) for s in seed] if isinstance(seed, list) else -1, torch.int64)
            yield (
                f"tensors {step} {seed}",
                lambda t=step, s=held: (
                    ops.noise(y.shape, s, step=torch.tensor(t)),
                    ops.refine(y, f, number(0.97), number(0.4), s, torch.tensor(t)),
                    ops.solver_step(y, f, number(EVERYTHING, torch.float32), s, torch.tensor(t), history=(m1, m2))[0],
                    *ops.q_sample(y, number([0.3, 0.3, 0.3]), s, torch.tensor(t)),
                    ops.refine(y, f, number(0.97), number(0.4), None, torch.tensor(t), z=m1),
                ),
            )


# (B, C, H, W, groups), a launch has few programs and a program many elements: the interpreter takes 30 ms a program
BATCH, LARGE, ODD = (2, 24, 33, 31, 2), (1, 32, 33, 31, 2), (1, 21, 45, 47, 3)
CHUNKS, TILE = (1, 4, 47, 45, 2), 2048  # a sample in several tiles of so many elements
NORMS = {
    "batch": (BATCH, {}),
    "silu=False": (ODD, {"silu": False}),
    "no shift": (ODD, {"shifted": False}),
    "pair": (LARGE, {"first": 5}),  # a group astride the seam
    "pair, no shift, silu=False": (ODD, {"first": 3, "shifted": False, "silu": False}),
    "mean 100": (LARGE, {"mean": 100.0}),
    "sum": (BATCH, {"add": True}),
    "sum, no shift, silu=False": (ODD, {"add": True, "shifted": False, "silu": False}),
    "sum, mean 100": (LARGE, {"add": True, "mean": 100.0}),
    "chunks": (CHUNKS, {}),
    "chunks of a sum": (CHUNKS, {"add": True, "mean": 100.0}),
}
CASES = [
    (name, layout, dtype)
    for name, layout, dtype in itertools.product(NORMS, LAYOUTS, DTYPES)
    if dtype == torch.float32 or NORMS[name][0] is not CHUNKS
]
SEEDS = (0, 100)  # two draws taken together: the largest of a few errors is a lottery


def norm_inputs(name, layout, dtype, seed):
    """The leaves, and the gradients that arrive."""
    shape, how = NORMS[name]
    h, weight, bias, shift = data(shape, dtype, "cpu", layout, mean=how.get("mean", 0.3), seed=seed)
    hs = split(h, how["first"]) if "first" in how else (h,)
    upstream = upstreams(3, shape, dtype, "cpu", layout, seed)
    residual = upstream[2:] if "add" in how else ()
    shift = (shift,) if how.get("shifted", True) else ()
    return (*hs, *residual, weight, bias, *shift), upstream[: 2 if "add" in how else 1]


def norm(name, kind, *leaves):
    """The case by sr3fast's ops (kind "ours") or by plain torch."""
    shape, how = NORMS[name]
    silu, shift = how.get("silu", True), leaves[-1] if how.get("shifted", True) else None
    first, second, weight, bias = (
        leaves[:4] if len(leaves) > 3 + (shift is not None) else (leaves[0], None, *leaves[1:3])
    )
    if "add" in how:
        if kind == "ours":
            return ops.add_group_norm_silu(first, second, weight, bias, shape[-1], shift=shift, silu=silu)
        return plain_add(first, second, weight, bias, shape[-1], shift=shift, silu=silu)
    h = first if second is None else (first, second)
    if kind == "ours":
        return ops.group_norm_silu(h, weight, bias, shape[-1], shift=shift, silu=silu)
    return plain(h, weight, bias, shape[-1], shift=shift, silu=silu)


def forward_and_backward(name, kind, inputs, upstream):
    inputs = leaves(*inputs)
    outs = norm(name, kind, *inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return *(o.detach() for o in outs), *gradients(lambda *t: norm(name, kind, *t), inputs, *upstream)


def norms():
    tiles = sys.modules["sr3fast.kernels.group_norm_silu"]
    for name, layout, dtype in CASES:
        tiles.SMALL = tiles.LARGE = TILE if NORMS[name][0] is CHUNKS else 1 << 18
        draws = [norm_inputs(name, layout, dtype, seed) for seed in SEEDS]
        yield (
            f"{name} {layout} {dtype}",
            lambda n=name, d=draws: sum((forward_and_backward(n, "ours", *i) for i in d), ()),
        )


# kind, (B, C, N, H, W), channels of the products, residual; tiles of 16 and 32 leave ragged edges everywhere
KINDS = {"3x3": (3, 1), "3x3, stride 2": (3, 2), "1x1": (1, 1), "up": (4, 2)}  # side, stride
CONVOLUTIONS = [
    ("3x3", (2, 24, 20, 5, 7), (), False),
    ("3x3", (1, 16, 40, 4, 6), (8,), False),
    ("3x3", (1, 32, 16, 3, 5), (40, 16), True),
    ("3x3, stride 2", (2, 24, 20, 5, 7), (), False),
    ("1x1", (3, 40, 20, 5, 3), (), True),
    ("up", (2, 24, 20, 3, 5), (), False),
]
CONVOLUTIONS = [(*c, parts, d) for c, parts, d in itertools.product(CONVOLUTIONS, (1, 2, 3, 4), DTYPES)]


def convolution_inputs(kind, shape, skips, with_residual, dtype):
    """h, weight, bias, residual or None, and the pairs of the products."""
    (B, C, N, H, W), (side, stride) = shape, KINDS[kind]
    size = (2 * H, 2 * W) if kind == "up" else (-(-H // stride), -(-W // stride))
    given = {"dtype": dtype, "layout": torch.channels_last}
    weight = random(*((C, N) if kind == "up" else (N, C)), side, side, seed=2, std=0.2, **given)
    products = [
        (random(B, c, *size, seed=3, **given), random(N, c, 1, 1, seed=4, std=0.2, **given).contiguous()) for c in skips
    ]
    residual = random(B, N, *size, seed=5, **given) if with_residual else None
    return random(B, C, H, W, seed=1, **given), weight, random(N, seed=6, dtype=dtype), residual, products


def plain_convolution(kind, h, weight, bias, residual, products):
    side, stride = KINDS[kind]
    if kind == "up":
        out = F.conv_transpose2d(h, weight, bias, stride, 1)
    else:
        out = F.conv2d(h, weight, bias, stride, side // 2)
    for s, v in products:
        out = out + F.conv2d(s, v)
    return out if residual is None else out + residual


def convolutions():
    conv = sys.modules["sr3fast.kernels.conv"]
    for kind, shape, skips, with_residual, parts, dtype in CONVOLUTIONS:
        inputs = convolution_inputs(kind, shape, skips, with_residual, dtype)
        yield f"{kind} {shape} {skips} {parts} {dtype}", lambda k=kind, i=inputs, n=parts: convolution(conv, k, n, *i)
    for dtype in DTYPES:
        out, residual = sums(dtype)
        bias = random(20, seed=6, dtype=dtype)
        yield f"sum {dtype}", lambda o=out, b=bias, r=residual: conv.add(o, b, r)
        yield f"bias {dtype}", lambda d=dtype, b=bias: conv.add(sums(d)[0], b, None)


def convolution(conv, kind, parts, h, weight, bias, residual, products):
    stride = KINDS[kind][1]
    B, N = len(h), len(bias)
    size = [2 * n if kind == "up" else -(-n // stride) for n in h.shape[2:]]
    out = torch.empty((B, N, *size), dtype=h.dtype, memory_format=torch.channels_last)
    plan = conv.Plan(16, 32, 16, 4, 2, parts)
    weight = conv.parities(weight) if kind == "up" else weight
    return conv.conv2d(out, h, weight, plan, 1 if kind == "up" else stride, products, bias, residual)


def sums(dtype):
    given = {"dtype": dtype, "layout": torch.channels_last}
    return random(2, 20, 9, 37, seed=1, **given), random(2, 20, 9, 37, seed=5, **given)


ATTENTIONS = [(2, 16, 32), (1, 37, 48), (3, 6, 16)]  # batch, positions, channels


def attentions():
    attention = sys.modules["sr3fast.kernels.attention"]
    for shape, dtype in itertools.product(ATTENTIONS, DTYPES[1:]):
        B, P, C = shape
        qkv = random(B, P, 3 * C, seed=1, dtype=dtype)
        out = torch.empty(B, P, C, dtype=dtype)
        tile = attention.tile(*shape, qkv.device)
        yield f"{shape} {dtype}", lambda o=out, q=qkv, t=tile: attention.attention(o, q, t)


GROUPS = {
    "convolutions": convolutions,
    "attentions": attentions,
    "whole": whole,
    "steps": steps,
    "scalars": scalars,
    "norms": norms,
}


def results(group):
    found = {}
    for name, make in GROUPS[group]():
        made = make()
        found[name] = made if isinstance(made, tuple) else (made,)
    return found


# ----------------------------------------------------------------------------------------- in the other process


def compute(path):
    from sr3fast import kernels  # noqa: F401

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    modules = {n: sys.modules[f"sr3fast.kernels.{n}"] for n in ("pixels", "step", "q_sample")}
    found = {}
    with backend.use("triton"):
        found["whole"] = results("whole")
        modules["pixels"].QUADS_INTERPRETED = 64  # a plane in several tiles, as on a GPU
        for group in ("steps", "scalars", "norms"):
            found[group] = results(group)
        for group in ("convolutions", "attentions"):
            found[group] = results(group)
        # as tensors on a GPU
        for name in ("pixels", "step", "q_sample"):
            modules[name].on_host = lambda t: not isinstance(t, torch.Tensor)
        found["in memory"] = results("scalars")
    torch.save(found, path)


# ---------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    here = str(Path(__file__).parent)
    search = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path, weights_only=True)


def others():
    return [home for home in ("torch", "cpp") if not isinstance(backend.load(home), str)]


def assert_same(actual, expected):
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name in expected:
        assert len(actual[name]) == len(expected[name]), name
        for i, (a, b) in enumerate(zip(actual[name], expected[name], strict=True)):
            assert same_bits(a, b), (name, i)


@pytest.mark.parametrize("other", others())
@pytest.mark.parametrize("group", ["whole", "steps", "scalars"])
def test_the_other_homes_bits(computed, group, other):
    with backend.use(other):
        assert_same(computed[group], results(group))


def test_scalars_in_memory(computed):
    assert_same(computed["in memory"], computed["scalars"])


def test_numbers_are_as_tensors(computed):
    found = computed["scalars"]
    assert_same(
        {name.removeprefix("numbers"): v for name, v in found.items() if name.startswith("numbers")},
        {name.removeprefix("tensors"): v for name, v in found.items() if name.startswith("tensors")},
    )


def test_known_normals(computed):
    def floats(words):
        return torch.tensor([int(w, 16) for w in words]).to(torch.int32).view(torch.float32)

    found = computed["whole"]
    known = {f"known {i}": k for i, k in enumerate(KNOWN["at"]) if k["c"] <= 1000}
    known |= {f"known image {i}": k for i, k in enumerate(KNOWN["images"])}
    assert len(known) > 5
    for name, k in known.items():
        assert same_bits(found[name][0], floats(k["normals"])), k


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES, ids=str)
def test_norms_are_as_exact_as_torch(computed, name, layout, dtype):
    ours = computed["norms"][f"{name} {layout} {dtype}"]
    simple, exact = [], []
    for seed in SEEDS:
        inputs, upstream = norm_inputs(name, layout, dtype, seed)
        simple += forward_and_backward(name, "plain", inputs, upstream)
        exact += forward_and_backward(name, "plain", double(*inputs), upstream)
    n = len(ours) // len(SEEDS)
    assert len(ours) == len(simple) and n >= 4
    for i in range(n):
        three = (torch.stack(list(t[i::n])) for t in (ours, simple, exact))
        assert_as_exact_as_torch(*three, f"output {i}")
    out = ours[0]
    assert out.is_contiguous(memory_format=layout) and not math.isnan(out.sum().item())


@pytest.mark.parametrize(("kind", "shape", "skips", "with_residual", "parts", "dtype"), CONVOLUTIONS, ids=str)
def test_convolutions_are_as_exact_as_torch(computed, kind, shape, skips, with_residual, parts, dtype):
    inputs = convolution_inputs(kind, shape, skips, with_residual, dtype)
    ours = computed["convolutions"][f"{kind} {shape} {skips} {parts} {dtype}"][0]
    *four, products = inputs
    exact = [None if t is None else t.double() for t in four], [(s.double(), v.double()) for s, v in products]
    assert_as_exact_as_torch(ours, plain_convolution(kind, *inputs), plain_convolution(kind, *exact[0], exact[1]))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_one_pass(computed, dtype):
    out, residual = sums(dtype)
    bias = random(20, seed=6, dtype=dtype)[:, None, None]
    for name, r in (("sum", residual), ("bias", torch.zeros_like(residual))):
        exact = out.double() + bias.double() + r.double()
        assert_as_exact_as_torch(computed["convolutions"][f"{name} {dtype}"][0], out + bias + r, exact)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_attention_is_as_exact_as_torch(computed, shape, dtype):
    B, P, C = shape
    qkv = random(B, P, 3 * C, seed=1, dtype=dtype)
    plain, exact = (F.scaled_dot_product_attention(*t.chunk(3, -1)) for t in (qkv, qkv.double()))
    assert_as_exact_as_torch(computed["attentions"][f"{shape} {dtype}"][0], plain, exact)


if __name__ == "__main__":
    compute(sys.argv[1])
