"""`make gpu-check` where no GPU is: it starts, says so, and what it would run is sound."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

# without them `make` prints as it does for a user, also under `make test`
OF_AN_OUTER_MAKE = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_target_starts_and_asks_for_a_gpu(tmp_path):
    recipe = subprocess.run(
        ["make", "-n", "gpu-check", f"GPU_PYTHON={sys.executable}", f"OUT={tmp_path}"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in OF_AN_OUTER_MAKE},
        capture_output=True,
        text=True,
        check=True,
    )
    check = recipe.stdout.splitlines()[-1]
    done = subprocess.run(check, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr, done.stderr


def test_what_the_sanitizer_runs():
    script = gpu_check.SANITIZE.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    done = subprocess.run([sys.executable, "-P", "-c", script, "torch"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr


def test_every_gpu_test_is_in_one_part():
    """Selected by the ids that conftest.py gives the homes."""
    parts = gpu_check.selections()
    names = ["test_a[cuda-cuda-x]", "test_a[triton-cuda]", "test_b[torch-cuda-3]", "test_cuda.py::test_c[cuda-(2, 3)]"]
    for name in names:
        chosen = [
            part
            for part, k in parts.items()
            if all((w.removeprefix("not ") in name) != w.startswith("not ") for w in k.split(" and "))
        ]
        assert len(chosen) == 1, (name, chosen)


def test_a_part_that_fails_or_hangs_is_told(monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT", 5)
    assert gpu_check.run([sys.executable, "-c", "print('said'); raise SystemExit(3)"])["exit"] == 3
    hung = gpu_check.run([sys.executable, "-u", "-c", "import time; print('said'); time.sleep(60)"])
    assert hung["exit"] is None and "said" in hung["tail"]
