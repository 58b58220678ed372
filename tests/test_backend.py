"""The table of homes, forcing one, the compiled home's instruction sets, threads, forks and the GIL."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import random, same_bits

from sr3fast import backend, ops
from sr3fast.device import find_device

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(
    isinstance(backend.load("cpp"), str), reason=f"no compiled module: {backend.load('cpp')}"
)


def python(code, timeout=120, **env):
    """Run code in a fresh process; its output."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ----------------------------------------------------------------------------------------------- the table


def test_every_home_has_every_op():
    for home in backend.MODULES:
        module = backend.load(home)
        if not isinstance(module, str):
            missing = [op for op in backend.OPS if not hasattr(module, op)]
            assert not missing, f"{home}: {missing}"


def test_use_forces_and_undoes(monkeypatch):
    called = []
    monkeypatch.setattr(backend.load("torch"), "refine", lambda y, *rest: called.append(1) or (y,))
    backend._find.cache_clear()
    y = random(1, 1, 2, 2)
    with backend.use("torch"):
        ops.refine(y, y, 0.9, 0.5, 1, 1)
        assert called == [1]
    backend._find.cache_clear()


def test_use_is_undone_by_an_exception():
    with pytest.raises(KeyError), backend.use("torch"):
        raise KeyError
    assert backend._forced.get() is None


def test_use_is_of_its_own_thread():
    seen = []
    with backend.use("torch"):
        thread = threading.Thread(target=lambda: seen.append(backend._forced.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_home():
    with (
        pytest.raises(ValueError, match=r"must be one of torch, cpp, cuda, triton: got 'numpy'"),
        backend.use("numpy"),
    ):
        pass
    code = "from sr3fast import ops\ntry: ops.noise((1, 1, 1, 1), 0)\nexcept ValueError as error: print(error)"
    assert "got 'numpy'" in python(code, SR3FAST_BACKEND="numpy")


def test_a_forced_home_that_cannot_is_refused(monkeypatch):
    with (
        backend.use("cuda"),
        pytest.raises(RuntimeError, match=r"'cuda' was asked for, but it does not run on cpu"),
    ):
        ops.noise((1, 1, 1, 1), 0)
    monkeypatch.setitem(backend.MODULES, "cpp", "sr3fast.not_there")
    backend.load.cache_clear(), backend._find.cache_clear()
    try:
        with (
            backend.use("cpp"),
            pytest.raises(RuntimeError, match=r"'cpp' was asked for, .*: No module named"),
        ):
            ops.noise((1, 1, 1, 1), 0)
        assert ops.noise((1, 1, 1, 1), 0).isfinite().all()  # not asked: plain torch does it
    finally:
        backend.load.cache_clear(), backend._find.cache_clear()


def test_the_environment_forces():
    code = "from sr3fast import backend; import torch; print(backend.find('noise', torch.device('cpu')).__qualname__)"
    assert "fill" in python(code, SR3FAST_BACKEND="torch")


def test_info():
    text = backend.info()
    assert all(op in text for op in backend.OPS) and all(home in text for home in backend.MODULES)
    with backend.use("torch"):
        assert "forced: torch" in backend.info()


# ------------------------------------------------------------------------------------- instruction sets


@needs_cpp
def test_an_unknown_instruction_set_is_refused():
    code = "from sr3fast import ops\ntry: ops.noise((1,1,1,1), 0)\nexcept ValueError as e: print(e)"
    assert "SR3FAST_ISA=sse9 was asked for" in python(code, SR3FAST_ISA="sse9")


@needs_cpp
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa):
    """The tests of the ops again, with a narrower instruction set than this machine would choose."""
    code = "import torch; from sr3fast import _C\ntry: print(_C.cpu.isa())\nexcept ValueError: print('none')"
    if python(code, SR3FAST_ISA=isa) == "none":
        pytest.skip(f"this machine or build has no {isa}")
    files = [str(TESTS / f"test_{name}.py") for name in ("noise", "ops_steps", "ops_norm", "conv3x3")]
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpp-cpu or conv3x3",
        *files,
    ]
    env = {**os.environ, "SR3FAST_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# -------------------------------------------------------------------------------- threads, forks, the GIL


FORK = """
import os, torch
from sr3fast import ops
torch.set_num_threads(2)
y = torch.zeros(1, 3, 256, 256)
w = torch.ones(3)
def work():
    h = y.clone().requires_grad_()
    ops.group_norm_silu(h, w, w, 3).sum().backward()
    return ops.refine(y, y, 0.9, 0.5, 1, 2)
expected = work()  # the parent's pool of threads now runs
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's DataLoader does in its workers
    os._exit(0 if torch.equal(work(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_cpp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_worker_does_not_hang():
    assert python(FORK, timeout=120) == "0"


@needs_cpp
def test_the_gil_is_released():
    """Another thread runs while a kernel does."""
    out = torch.empty(4, 3, 512, 512)
    h = out.clone()
    run_noise = backend.find("noise", CPU)
    run_norm = backend.find("group_norm_silu", CPU)
    seed, step, parameter, moments = torch.tensor(1), torch.tensor(1), torch.ones(3), torch.empty(4, 3)
    ticks, stop, interval = [], threading.Event(), sys.getswitchinterval()

    def tick():
        while not stop.is_set():
            ticks.append(None)
            time.sleep(0)  # gives the GIL up by itself

    thread = threading.Thread(target=tick)
    sys.setswitchinterval(1000)  # nobody takes the GIL from the thread that holds it
    try:
        thread.start()
        for run, args in (
            (run_noise, ((out,), seed, step, 1, (0, 0))),
            (run_norm, ((out, moments, moments.clone()), h, None, parameter, parameter, 3, 1e-5, None, True)),
        ):
            for _ in range(100):
                before = len(ticks)
                run(*args)
                if len(ticks) > before:
                    break
            else:
                pytest.fail("no other Python thread ran while the kernel did")
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


@needs_cpp
def test_concurrent_calls():
    """Calls from several Python threads do not disturb each other."""
    y = random(2, 3, 128, 130)
    expected = [ops.refine(y, y, 0.9, 0.5, seed, 2) for seed in range(4)]
    results = [None] * 4

    def work(i):
        for _ in range(20):
            results[i] = ops.refine(y, y, 0.9, 0.5, i, 2)

    pool = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert all(map(same_bits, results, expected))


@needs_cpp
def test_beyond_two_to_the_31():
    """Offsets of a tensor with more than 2^31 elements between its first and its last."""
    big = torch.empty_strided((2, 1, 1, 8), (2**31 + 8, 8, 8, 1), dtype=torch.bfloat16)
    y = random(2, 1, 1, 8)
    out = ops.refine(y, y, 0.9, 0.5, 1, 2, into=big)
    assert same_bits(big.contiguous(), out.bfloat16())


def test_the_first_gpu_is_not_the_default_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "device", lambda name: asked.append(name) or "cpu")
    find_device(0)
    assert asked == [0]
