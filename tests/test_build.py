"""The build on machines that lack something, what forces it, and what an sdist and a wheel hold."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNSET = {"SR3FAST_BUILD_CPP": "", "SR3FAST_BUILD_CUDA": ""}
NO_COMPILER = {"CXX": "/no/such/compiler", "CUDACXX": "/no/such/compiler", **UNSET}
WITHOUT_VECTORS = {"CXXFLAGS": "-D__builtin_convertvector=none", **UNSET}
OLD_NVCC = """#!/bin/sh
test "$*" = --version && echo "Cuda compilation tools, release 11.5, V11.5.119" || exec nvcc "$@"
"""
NAMES = [f"{family}-{n}" for family, oldest in (("g++", 9), ("clang++", 13)) for n in range(oldest, 30)]
OTHER_COMPILERS = {os.path.realpath(c): n for n in NAMES if (c := shutil.which(n))}
OTHER_COMPILERS.pop(os.path.realpath(shutil.which("c++") or ""), None)  # which builds the package
NOT_COPIED = (".git", ".venv", "build", "*.egg-info", "*.so", "__pycache__", ".hypothesis", ".*_cache", "runs")
pytest.importorskip("scikit_build_core", reason="the builds fetch nothing: they need the test extra's build tools")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The names in an sdist, and it unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "checkout"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_COPIED))
    build = "from scikit_build_core.setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return names, unpacked


def wheel(sdist, folder, **variables):
    """What pip printed, its line breaks gone, and the wheel where one was made."""
    source = folder / "source"
    shutil.copytree(sdist[1], source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(source)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = next(folder.glob("*.whl"), None)
    assert (done.returncode == 0) == (made is not None)
    return " ".join(done.stdout.split()), made


def run_installed(made, folder, code):
    """A program's output where that wheel, not this checkout, is what it imports."""
    with zipfile.ZipFile(made) as archive:
        archive.extractall(folder / "site")
    alone = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"  # which finds our _C
    program = f"import sys; sys.path.insert(0, {str(folder / 'site')!r}); {alone}; {code}"
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(*folders):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()


def test_an_sdist_holds_what_the_checkout_does(sdist):
    names, _ = sdist
    missing = {name for name in tracked() if name not in names}
    assert missing <= {".gitignore", ".ci/run", "MANIFEST.in"}


def test_no_compiler_at_all(sdist, tmp_path):
    said, made = wheel(sdist, tmp_path, **NO_COMPILER)
    assert made is not None, said
    assert "installing without compiled kernels (plain torch)" in said
    names = zipfile.ZipFile(made).namelist()
    assert {"sr3fast/py.typed", "sr3fast/kernels/noise.py", "sr3fast/models/photo-x4/model.safetensors"} <= set(names)
    assert not any("_C" in name for name in names)
    code = "import torch, sr3fast; from sr3fast import backend, ops; print(sr3fast.__file__); print(backend.info()); "
    code += "y = torch.ones(1, 3, 8, 8); print(ops.refine(y, y, 0.9, 0.5, 3, 4).isfinite().all().item())"
    where, *info, finite = run_installed(made, tmp_path, code).splitlines()
    assert where.startswith(str(tmp_path)) and finite == "True"
    (cpp,) = [line for line in info if line.startswith("cpp")]
    assert "no " in cpp and "install with a C++ compiler" in cpp
    (refine,) = [line for line in info if line.startswith("refine")]
    assert refine.split() == ["refine", "torch", "torch"]


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"SR3FAST_BUILD_CPP": "1"}, "SR3FAST_BUILD_CPP=1 asks for CXX, but there is no CXX compiler"),
        ({"SR3FAST_BUILD_CUDA": "1"}, "SR3FAST_BUILD_CUDA=1 needs a C++ compiler too"),
        ({"SR3FAST_BUILD_CPP": "ON"}, "SR3FAST_BUILD_CPP must be 0 or 1 (or unset: what the machine has): got ON"),
    ],
)
def test_what_is_asked_for_is_built_or_refused(sdist, tmp_path, variables, why):
    said, made = wheel(sdist, tmp_path, **NO_COMPILER | variables)
    assert made is None and why in said


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("asked", ["", "1"])
def test_a_compiler_that_does_not_do(sdist, tmp_path, asked):
    said, made = wheel(sdist, tmp_path, **WITHOUT_VECTORS | {"SR3FAST_BUILD_CPP": asked})
    assert "lacks the vector extensions of GCC 9 and Clang 13" in said
    assert (made is None) == (asked == "1")
    assert made is None or not any("_C" in name for name in zipfile.ZipFile(made).namelist())


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_an_old_nvcc_is_refused(sdist, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(OLD_NVCC)
    nvcc.chmod(0o755)
    said, made = wheel(sdist, tmp_path, **UNSET | {"CUDACXX": str(nvcc), "SR3FAST_BUILD_CUDA": "1"})
    assert made is None and f"the CUDA kernels need CUDA 12.0, and {nvcc} is of 11.5" in said


@pytest.mark.parametrize("compiler", OTHER_COMPILERS.values())
@pytest.mark.parametrize("source", ["step", "group_norm_silu", "conv3x3"])
def test_every_other_compiler_here_takes_the_kernels(compiler, source):
    """On the machine's own processor, and on x86 with the wider vectors too."""
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    wide = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]}
    wide["avx512"] += wide["avx2"]
    for isa, flags in {"baseline": [], **(wide if machine.startswith("x86_64") else {})}.items():
        command = [compiler, "-std=c++17", "-O1", "-Wno-psabi", f"-DSR3FAST_ISA={isa}", *flags, "-o", os.devnull]
        done = subprocess.run([*command, "-c", str(ROOT / f"csrc/cpu/{source}.cpp")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


@needs_compiler
def test_a_compiled_wheel(sdist, tmp_path):
    said, made = wheel(sdist, tmp_path, SR3FAST_BUILD_CPP="1", SR3FAST_BUILD_CUDA="0", CXX="env c++")  # as "ccache c++"
    assert made is not None, said[-3000:]
    names = zipfile.ZipFile(made).namelist()
    assert sum(name.startswith("sr3fast/_C.") for name in names) == 1
    assert {*tracked("sr3fast"), *(f"sr3fast/{name}" for name in tracked("kernels"))} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/", "kernels/")) for name in names)
    code = "import torch; from sr3fast import backend, ops; print(type(backend.load('cpp')).__name__); "
    code += "print(ops.noise((1, 1, 1, 4), 0, domain=0).view(torch.int32)[0, 0, 0, 0].item() == 0x3f7dbb31)"
    assert run_installed(made, tmp_path, code).split() == ["CppHome", "True"]
