"""What Triton makes of kernels/ for sm_90, read without a GPU: no spills, 16-byte accesses, no fma in the noise.

TRITON_INTERPRET is read when a kernel is decorated, and Triton's driver is one a process, so another process
calls the home as a launch does, compiles in place of running (`python test_triton_compile.py FOLDER`), and leaves
the PTX and the machine code, which the tests read. Its tensors lie on torch's meta device: they have an address,
shapes, strides and a dtype, all that a launch specialises on, and take no memory.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import sass  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_disassembler = pytest.mark.skipif(
    sass.cuobjdump() is None, reason="neither CUDA's nor Triton's cuobjdump is there"
)

ROW = (1.2, 0.7, 1.0, 0.9, -0.1, 0.3, 0.2, -0.4, 0.5)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNFUSED = {"noise_kernel", "step_kernel", "q_sample_kernel"}  # where bits are promised


# ----------------------------------------------------------------------------------------- in the other process


def meta(*shape, dtype=F32, layout="nchw"):
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)


def noises(kernels, number):
    shape = (8, 3, 128, 128)
    for dtype in (F32, BF16):
        yield f"{dtype}", lambda d=dtype: kernels.noise((meta(*shape, dtype=d),), 5, 3, 1, (0, 0))
    yield "odd", lambda: kernels.noise((meta(3, 6, 33, 31),), 5, 3, 1, (3, 5))
    seeds = meta(8, dtype=torch.int64)
    yield "in memory", lambda: kernels.noise((meta(*shape),), seeds, number(torch.int64), 1, (0, 0))


def steps(kernels, number):
    gamma = torch.tensor(0.3, dtype=torch.float64)
    row, drawn, given = torch.tensor(ROW), (5, 3, None, (0, 0)), (5, 3, meta(8, 3, 128, 128), (0, 0))
    # every way that a lane's elements lie: NCHW; all of few channels, tiles of four channels, the strided rest
    for layout, c in (("nchw", 3), ("nhwc", 3), ("nhwc", 16), ("nhwc", 6)):
        y = meta(8, c, 128, 128, layout=layout)
        for dtype in (F32, BF16):
            f = meta(*y.shape, dtype=dtype, layout=layout)
            what = f"{layout} {c} {dtype}"
            yield f"refine {what}", lambda y=y, f=f: kernels.refine((y, None), y, f, 0.9, 0.5, *drawn)
            step = (5, 3, y, y, None, (0, 0))
            yield f"row {what}", lambda y=y, f=f, s=step: kernels.solver_step((y, y, None), y, f, row, *s)
            yield f"diffuse {what}", lambda f=f: kernels.q_sample((f, f, None), f, gamma, *drawn)
    for layout in ("nchw", "nhwc"):
        y = meta(8, 3, 128, 128, layout=layout)
        # some channels of a network's buffers, scalars in memory
        b = meta(8, 8, 128, 128, dtype=BF16, layout="nhwc")[:, 3:6]
        seeds, step = meta(8, dtype=torch.int64), number(torch.int64)
        live = (seeds, step, None, (0, 0))
        rest = (number(torch.int64), step, y, y, None, (0, 0))
        yield f"refine into {layout}", lambda y=y, b=b, v=live: kernels.refine((y, b), y, b, number(), number(), *v)
        yield (
            f"row into {layout}",
            lambda y=y, b=b, r=rest: kernels.solver_step((y, y, b), y, b, meta(9), *r),
        )
        gammas = meta(8, dtype=torch.float64)
        yield f"diffuse into {layout}", lambda y=y, b=b, g=gammas, v=live: kernels.q_sample((y, y, b), y, g, *v)
        odd = meta(3, 6, 33, 31, layout=layout)
        placed = (5, 3, None, (3, 5))
        yield (
            f"row odd {layout}",
            lambda y=odd: kernels.solver_step((y, y, None), y, y, row, 5, 3, y, y, None, (3, 5)),
        )
        yield f"diffuse odd {layout}", lambda y=odd, p=placed: kernels.q_sample((y, y, None), y, gamma, *p)
    y = meta(8, 3, 128, 128)
    yield "refine given", lambda: kernels.refine((y, None), y, y, 0.9, 0.5, *given)
    yield "row given", lambda: kernels.solver_step((y, y, None), y, y, row, 5, 3, y, y, y, (0, 0))
    yield "diffuse given", lambda: kernels.q_sample((y, None, None), y, gamma, *given)


def norms(kernels, number):
    for layout in ("nchw", "nhwc"):
        for size, dtype, shape in (
            ("small", BF16, (8, 64, 16, 16)),
            ("large", BF16, (8, 64, 256, 128)),
            ("large", F32, (8, 64, 256, 128)),
            ("odd", F16, (3, 37, 33, 31)),
        ):
            h = meta(*shape, dtype=dtype, layout=layout)
            yield f"norm {size} {layout} {dtype}", lambda h=h: norm(kernels, h, meta(*h.shape[:2], dtype=h.dtype), True)
            if size != "large":
                yield f"plain norm {size} {layout} {dtype}", lambda h=h: norm(kernels, h, None, False)
                yield f"sum {size} {layout} {dtype}", lambda h=h: add_norm(kernels, h)
                yield f"pair {size} {layout} {dtype}", lambda h=h, layout=layout: pair_norm(kernels, h, layout)


def parameters(h, channels):
    """weight, bias; a moment of the groups; dweight, dbias, dshift."""
    p, moment = meta(channels, dtype=h.dtype), meta(h.shape[0], groups_of(channels))
    return p, moment, (meta(channels), meta(channels), meta(h.shape[0], channels))


def groups_of(channels):
    return 32 if channels % 32 == 0 else 1


def norm(kernels, h, shift, silu):
    groups = groups_of(h.shape[1])
    p, moment, (dw, db, ds) = parameters(h, h.shape[1])
    kernels.group_norm_silu((h, moment, moment), h, None, p, p, groups, 1e-5, shift, silu)
    outs = (h, None, dw, db, None if shift is None else ds)
    kernels.group_norm_silu_backward(outs, h, h, None, p, p, moment, moment, groups, shift, silu, None)


def add_norm(kernels, h):
    groups = groups_of(h.shape[1])
    p, moment, (dw, db, _) = parameters(h, h.shape[1])
    shift = meta(*h.shape[:2], dtype=h.dtype)
    kernels.add_group_norm_silu((h, h, moment, moment), h, h, p, p, groups, 1e-5, shift, True)
    outs = (h, None, dw, db, None)
    kernels.group_norm_silu_backward(outs, h, h, None, p, p, moment, moment, groups, None, True, h)


def pair_norm(kernels, h, layout):
    channels = 2 * h.shape[1]
    groups = groups_of(channels)
    both = meta(h.shape[0], channels, *h.shape[2:], dtype=h.dtype, layout=layout)
    p, moment, (dw, db, ds) = parameters(h, channels)
    shift = meta(h.shape[0], channels, dtype=h.dtype)
    kernels.group_norm_silu((both, moment, moment), h, h, p, p, groups, 1e-5, shift, True)
    kernels.group_norm_silu_backward((h, h, dw, db, ds), both, h, h, p, p, moment, moment, groups, shift, True, None)


def convolutions(kernels, number):
    """Each tile that `plan` gives, at the network's shapes: whole and in parts, with all that is added."""
    conv = kernels.conv

    def call(M, N, channels, stride=1, up=False, sums=False):
        plan = conv.plan(M, N, channels, 132, stride, up, sums)
        side = round(M**0.5)
        outside = 2 * side if up else side
        out = meta(1, N, outside, outside, dtype=BF16, layout="nhwc")
        h = meta(1, channels[0], stride * side, stride * side, dtype=BF16, layout="nhwc")
        taps = (4, N, 2, 2, channels[0]) if up else (N, channels[0], 3, 3)
        weight = meta(*taps, dtype=BF16, layout="nhwc" if not up else "nchw")
        products = [
            (meta(1, c, side, side, dtype=BF16, layout="nhwc"), meta(N, c, 1, 1, dtype=BF16)) for c in channels[1:]
        ]
        residual = out if sums and not products else None
        conv.conv2d(out, h, weight, plan, stride, products, meta(N, dtype=BF16), residual)

    for name, *given in (
        ("128^2", 128**2, 64, [64]),
        ("128^2 residual", 128**2, 64, [64], 1, False, True),
        ("128^2 products", 128**2, 64, [64, 128, 64], 1, False, True),
        ("128^2 out", 128**2, 8, [64]),
        ("256^2 stride 2", 128**2, 64, [64], 2),
        ("64^2", 64**2, 128, [128]),
        ("64^2 long", 64**2, 128, [256]),
        ("32^2 products", 32**2, 256, [256, 512, 256], 1, False, True),
        ("8^2", 8**2, 512, [512]),
        ("8^2 products", 8**2, 512, [512, 512, 512], 1, False, True),
        ("large products", 256**2, 128, [128, 128], 1, False, True),
        ("up 64^2", 64**2, 128, [128], 1, True),
        ("up 16^2", 16**2, 512, [512], 1, True),
    ):
        yield f"convolution {name}", lambda g=given: call(*g)
    yield "sums", lambda: conv.add(meta(1, 64, 8, 8, layout="nhwc"), meta(64), meta(1, 64, 8, 8, layout="nhwc"))


def attentions(kernels, number):
    for batch in (1, 8):
        tile = kernels.attention.tile(batch, 256, 512, torch.device("meta"))
        qkv, out = meta(batch, 256, 1536, dtype=BF16), meta(batch, 256, 512, dtype=BF16)
        yield f"attention {batch}", lambda o=out, q=qkv, t=tile: kernels.attention.attention(o, q, t)


class Offline:
    """The driver of a GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_kernels(folder):
    """Leaves N.ptx and N.cubin of each compiled kernel, and index.json: what each is."""
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from sr3fast import kernels

    driver.set_active(Offline())
    run, case, index, seen = JITFunction.run, "", [], set()

    def compile_only(self, *args, grid, warmup, **keywords):
        compiled = run(self, *args, grid=grid, warmup=True, **keywords)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            n = len(index)
            (folder / f"{n}.ptx").write_text(compiled.asm["ptx"])
            (folder / f"{n}.cubin").write_bytes(compiled.asm["cubin"])
            fused = compiled.metadata.enable_fp_fusion
            index.append({"case": case, "kernel": self.fn.__name__, "fused": fused, "file": str(n)})

    JITFunction.run = compile_only
    for group in (noises, steps, norms, convolutions, attentions):
        for case, call in group(kernels, lambda dtype=torch.float64: meta(dtype=dtype)):  # noqa: B007
            call()
    defined = {
        name
        for module in ("noise", "step", "q_sample", "group_norm_silu", "conv", "attention")
        for name, value in vars(sys.modules[f"sr3fast.kernels.{module}"]).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    (folder / "index.json").write_text(
        json.dumps({"triton": triton.__version__, "defined": sorted(defined), "compiled": index})
    )


# ---------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return json.loads((folder / "index.json").read_text())


@pytest.fixture(scope="module")
def machine_code(folder, index):
    """(case, kernel's name) and its sass.Kernel."""
    return [(k["case"], *sass.read_cubin(folder / f"{k['file']}.cubin", "kernels")) for k in index["compiled"]]


def test_every_kernel_compiles(index):
    assert {k["kernel"] for k in index["compiled"]} == set(index["defined"]) >= UNFUSED
    assert len(index["defined"]) == 12


def test_no_fused_multiply_add_where_bits_are_promised(folder, index):
    found = [k for k in index["compiled"] if k["kernel"] in UNFUSED]
    for k in found:
        ptx = (folder / f"{k['file']}.ptx").read_text()
        assert not k["fused"], k  # else ptxas may fuse what the PTX does not
        assert not re.findall(r"\b(?:fma|mad)(?:\.\w+)*\.f(?:32|64)\b", ptx), k
        assert not re.findall(r"\b(?:sqrt|div|rcp)\.(?:approx|full)\S*", ptx), k
        if "given" not in k["case"]:
            assert len(re.findall(r"\bsqrt\.rn\.f32\b", ptx)) > 0, k
            assert len(re.findall(r"\bmul(?:\.rn)?\.f32\b", ptx)) > 50, k
    assert {k["kernel"] for k in found} == UNFUSED


def test_others_may_fuse(index):
    assert all(k["fused"] for k in index["compiled"] if k["kernel"] not in UNFUSED)


@needs_disassembler
def test_no_local_memory(machine_code, index):
    # the ptxas of Triton 3.6 holds some norms to 32 or 80 registers and puts up to four of a thread's aside
    old = tuple(map(int, index["triton"].split(".")[:2])) < (3, 9)
    for case, k in machine_code:
        local = {name: n for name, n in k.memory.items() if name.startswith(("LDL", "STL"))}
        if old and k.name not in UNFUSED:
            assert k.stack <= 16 and sum(local.values()) <= 4, f"{case}: {k.name}: {k.stack} bytes of stack, {local}"
        else:
            assert not local and k.stack == 0, f"{case}: {k.name}: {k.stack} bytes of stack, {local}"


# case, kernel: least 16-byte loads and stores of global memory a thread; it has two quads of K channels, or a tile
F_32, F_16 = r"torch\.float32", r"torch\.(b?)float16"
WIDE = [
    (rf"{F_32}|in memory", "noise_kernel", 0, 2),
    (rf"refine nchw 3 {F_32}", "step_kernel", 4, 2),  # y, eps_hat; out
    (rf"row nchw 3 {F_32}", "step_kernel", 8, 4),  # y, eps_hat, m1, m2; out, m
    (rf"diffuse nchw 3 {F_32}", "q_sample_kernel", 2, 4),  # y_0; out, eps
    (rf"refine nhwc 3 {F_32}", "step_kernel", 12, 6),
    (rf"row nhwc 3 {F_32}", "step_kernel", 24, 12),
    (rf"diffuse nhwc 3 {F_32}", "q_sample_kernel", 6, 12),
    (rf"refine nhwc 16 {F_32}", "step_kernel", 16, 8),
    (rf"row nhwc 16 {F_32}", "step_kernel", 32, 16),
    (rf"diffuse nhwc 16 {F_32}", "q_sample_kernel", 8, 16),
    (rf"refine nchw 3 {F_16}", "step_kernel", 2, 2),
    (rf"row nchw 3 {F_16}", "step_kernel", 6, 4),
    (r"refine given", "step_kernel", 6, 2),
    (r"row given", "step_kernel", 10, 4),
    (r"diffuse given", "q_sample_kernel", 4, 2),
    (r"(refine|row) into nchw", "step_kernel", 2, 2),
    (r"norm large \w+ .*", "(moments|sums)_kernel", 8, 0),
    (r"norm large \w+ .*", "normalise_kernel", 8, 8),
    (r"norm large \w+ .*", "backward_kernel", 8, 4),
    (r"(plain )?norm small \w+ .*", "(moments|sums)_kernel", 2, 0),
    (r"(plain )?norm small \w+ .*", "normalise_kernel", 2, 2),
    (r"(plain )?norm small \w+ .*", "backward_kernel", 2, 1),
    (r"pair small \w+ .*", "normalise_kernel", 2, 2),
    (r"sum small \w+ .*", "moments_kernel", 4, 2),
    (r"sums|convolution .*", "sum_kernel", 1, 1),
]


@needs_disassembler
@pytest.mark.parametrize(("case", "name", "loads", "stores"), WIDE, ids=[f"{w[0]}-{w[1]}" for w in WIDE])
def test_global_memory_goes_in_16_bytes(machine_code, case, name, loads, stores):
    found = [(c, k) for c, k in machine_code if re.fullmatch(case, c) and re.fullmatch(name, k.name)]
    assert found
    for c, k in found:
        assert k.memory["LDG.E.128"] + k.memory["LDG.E.128.CONSTANT"] >= loads, (c, k.memory)
        assert k.memory["STG.E.128"] >= stores, (c, k.memory)


@needs_disassembler
def test_a_quad_of_half_precision_goes_in_8_bytes(machine_code):
    found = [(c, k) for c, k in machine_code if re.fullmatch(rf"(refine|row|diffuse) n\w+ (3|16) {F_16}", c)]
    assert found
    for c, k in found:
        assert k.memory["LDG.E.64"] >= 2, (c, k.memory)


if __name__ == "__main__":
    compile_kernels(Path(sys.argv[1]))
