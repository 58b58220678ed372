"""The benchmarks run to their end, agreement checks and all, on a small network: what they say of time is nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# the network is small, and diffusers', which is not, stays away
SAMPLING = """
import sys
sys.modules["diffusers"] = None
import pytest, sampling
from sr3fast import UNet
sampling.network = lambda device: UNet(channels=8, multipliers=(1, 1, 2, 2), blocks=1, groups=4).to(device).eval()
import profile_step
profile_step.main()
sys.exit(pytest.main(["--benchmark-only", "-q", "-p", "no:cacheprovider", "test_ladder.py", "test_sampling.py"]))
"""
TRAINING = """
import test_training
for low in (False, True):
    test_training.check_gradient(low)
for name in test_training.NAMES:
    test_training.step_of(name)(0)
"""


def run(out, *command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OUT": str(out), "SR3FAST_BENCH_COMPILE": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {file.stem.rpartition("-")[0]: json.loads(file.read_text())["results"] for file in out.glob("*.json")}


def test_sampling_and_the_ladder(tmp_path):
    found = run(tmp_path, "-c", SAMPLING)
    assert {r["implementation"] for r in found["sampling"]} >= {"eager float32", "sr3fast float32", "sr3fast bfloat16"}
    assert {r["dtype"] for r in found["profile"]} == {"float32", "bfloat16"}
    for name, dtype in (("ladder", "bfloat16"), ("ladder-float32", "float32")):
        rungs = [r["rung"] for r in found[name]]
        assert rungs[:2] == ["eager float32", f"engine, {dtype}"] and len(rungs) > 5


def test_training(tmp_path):
    run(tmp_path, "-c", TRAINING)


def test_ops(tmp_path):
    cases = ("test_op and 1x3x128x128", "test_op and noise and 8x3", "test_fresh and 1x3x128x128 and kept")
    command = ("-P", "-m", "pytest", "--benchmark-only", "-q", "-p", "no:cacheprovider", "test_ops.py", "-k")
    found = run(tmp_path, *command, " or ".join(f"({case})" for case in cases))
    assert {r["op"] for r in found["ops"]} == {"refine", "noise"}
