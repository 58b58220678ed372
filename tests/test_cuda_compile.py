"""What nvcc makes of csrc/cuda, read without a GPU: no spills, 16-byte accesses, no fused multiply-add in the noise."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import sass  # noqa: E402

pytestmark = pytest.mark.skipif(sass.nvcc() is None, reason="nvcc is not installed")
needs_disassembler = pytest.mark.skipif(
    sass.cuobjdump() is None, reason="neither CUDA's nor Triton's cuobjdump is there"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")
    sass.compile_kernels(folder)
    return folder


@pytest.fixture(scope="module")
def kernels(compiled):
    return sass.read_kernels(compiled)


def test_every_file_has_its_ptx(compiled):
    assert {p.stem for p in compiled.glob("*.ptx")} == {s.stem for s in sass.SOURCES}
    assert "entry" in (compiled / "noise_step.ptx").read_text()


@pytest.mark.parametrize("source", sorted(sass.UNFUSED))
def test_no_fused_multiply_add_where_bits_are_promised(compiled, source):
    ptx = (compiled / source).with_suffix(".ptx").read_text()
    assert len(re.findall(r"\bmul\.rn\.f32\b", ptx)) > 50
    assert len(re.findall(r"\brsqrt\.approx\.ftz\.f32\b", ptx)) > 0
    # noise.h writes its own in assembly: of exact products, and of the square root
    ptx, meant = re.subn(r"// begin inline asm\n[^/]*fma\.rn\.f32[^/]*// end inline asm", "", ptx)
    assert meant > 0
    assert not re.findall(r"\b(?:fma|mad)(?:\.\w+)*\.f(?:32|64)\b", ptx)
    # without .rn the assembler may fuse them itself
    assert not re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)\b", ptx)


def test_the_build_leaves_the_same_files_unfused():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    (names,) = re.findall(r"set_source_files_properties\(([^)]*?)\s+PROPERTIES COMPILE_OPTIONS \"-fmad=false\"", cmake)
    assert {Path(name).name for name in names.split()} == sass.UNFUSED


@needs_disassembler
def test_no_local_memory(kernels):
    assert len(kernels) > 50
    for k in kernels:
        local = {name: n for name, n in k.memory.items() if name.startswith(("LDL", "STL"))}
        assert not local and k.stack == 0, f"{k.name} in {k.source}: {k.stack} bytes of stack, {local}"


def count(kernel, pattern):
    return sum(n for name, n in kernel.memory.items() if re.fullmatch(pattern, name))


# kernels: least 16-byte loads and stores of global memory; a thread has two quads, or some vectors in flight
WIDE = [
    (r"step_kernel<float, \w+, \w+>", 4, 4),  # y, eps_hat; out, m or into
    (r"step_kernel<(__half|__nv_bfloat16), \w+, \w+>", 2, 4),
    (r"q_sample_kernel<float, \w+, \w+>", 2, 4),  # y_0; out, eps
    (r"q_sample_kernel<(__half|__nv_bfloat16), \w+, \w+>", 1, 2),
    (r"noise_kernel<\w+>", 0, 2),
    (r"(cluster|grid)_kernel<\w+, [48], \w+>", 0, 4),  # what they load is copied, see below
    (r"moments_kernel<\w+, [48], \w+>", 4, 4),
    (r"apply_kernel<\w+, [48], \w+>", 4, 4),
    (r"(cluster|grid)_kernel<\w+, [48], \w+, \w+>", 0, 4),
    (r"sums_kernel<\w+, [48], \w+, \w+>", 8, 0),
    (r"apply_kernel<\w+, [48], \w+, \w+>", 4, 2),
]


@needs_disassembler
@pytest.mark.parametrize(("pattern", "loads", "stores"), WIDE, ids=[w[0] for w in WIDE])
def test_global_memory_goes_in_16_bytes(kernels, pattern, loads, stores):
    found = [k for k in kernels if re.fullmatch(pattern, k.name)]
    assert found
    for k in found:
        assert count(k, r"LDG\.E\.128(\.CONSTANT)?") >= loads, (k.name, k.memory)
        assert count(k, r"STG\.E\.128") >= stores, (k.name, k.memory)


@needs_disassembler
def test_half_eps_hat_beside_y_in_8_bytes(kernels):
    for k in kernels:
        if re.fullmatch(r"step_kernel<(__half|__nv_bfloat16), \w+, \w+>", k.name):
            assert count(k, r"LDG\.E\.64") >= 2, (k.name, k.memory)


@needs_disassembler
def test_shared_memory_keeps_vectors_whole(kernels):
    """The kernels that keep what they read: copied there in 16 bytes, without a register, and read so."""
    found = [k for k in kernels if re.fullmatch(r"(cluster|grid)_kernel<\w+, [48], \w+(, \w+)?>", k.name)]
    assert len(found) == 2 * 3 * 2 * 3
    for k in found:
        assert count(k, r"LDGSTS\.E\.BYPASS(\.\w+)*\.128(\.\w+)*") >= 1, (k.name, k.memory)
        assert count(k, r"LDS\.128") >= 4, (k.name, k.memory)


def test_a_grid_meets_in_global_memory(compiled):
    """Whoever waits there reads past its own caches, and what it reads is one access."""
    for name in ("group_norm_silu", "group_norm_silu_backward"):
        ptx = (compiled / f"{name}.ptx").read_text()
        kernels = [part for part in ptx.split(".entry ")[1:] if "grid_kernel" in part.split("(")[0]]
        assert kernels
        for kernel in kernels:
            assert "st.relaxed.gpu.global.u64" in kernel and "ld.relaxed.gpu.global.u64" in kernel
            assert "barrier.cluster" not in kernel


def test_clusters_meet_through_their_barrier(compiled):
    """Blocks of a cluster write into each other's shared memory between two phases of the cluster's barrier."""
    for name in ("group_norm_silu", "group_norm_silu_backward"):
        ptx = (compiled / f"{name}.ptx").read_text()
        kernels = [part for part in ptx.split(".entry ")[1:] if "cluster_kernel" in part.split("(")[0]]
        assert kernels
        for kernel in kernels:
            # the first tells that the block runs, the second shows what it wrote
            arrivals = re.findall(r"barrier\.cluster\.arrive(\.relaxed)?", kernel)
            assert arrivals == [".relaxed", ""]
            assert len(re.findall(r"barrier\.cluster\.wait", kernel)) == 2
            assert "mapa" in kernel
