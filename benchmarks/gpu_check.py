"""The checks that need a GPU: the tests marked gpu, then compute-sanitizer over small shapes. Writes gpu-check.json.

The parts run side by side, each in a process of its own: what breaks one leaves the others' answers, and the file is
written anew after each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from environment import environment

LIMIT = 360  # seconds of a part; the Makefile promises 9 minutes with the build
# processes of a part's tests, where pytest-xdist is installed: Triton compiles
WORKERS = {"cuda home": 3, "triton home": 9, "torch home": 3, "the rest": 3}

SANITIZE = """
import sys
import torch
from sr3fast import ops, backend

def norms(h, groups, pair=None):
    c = h.shape[1] + (0 if pair is None else pair.shape[1])
    w, b = (torch.randn(c, device="cuda", requires_grad=True) for _ in range(2))
    shift = torch.randn(h.shape[0], c, device="cuda", requires_grad=True)
    ops.group_norm_silu(h if pair is None else (h, pair), w, b, groups, shift=shift).float().square().sum().backward()
    if pair is None:
        out, s = ops.add_group_norm_silu(h, torch.randn_like(h), w, b, groups, shift=shift)
        (out.float() + s.float()).square().sum().backward()

with backend.use(sys.argv[1]):
    for layout in (torch.contiguous_format, torch.channels_last):
        def new(*shape, dtype=torch.float32):
            return torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        for size in ((33, 31), (32, 32)):
            y = new(2, 3, *size)
            network = torch.zeros(2, 8, *size, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
            out = torch.empty_like(y)
            with torch.no_grad():
                ops.refine(y, torch.randn_like(y), 0.99, 0.5, 7, 3, origin=(1, 2), out=out, into=network[:, 3:6])
            row = (1.2, 0.7, 1.0, 0.9, -0.2, 0.3, 0.1, -0.05, 0.4)
            ops.solver_step(y, torch.randn_like(y).bfloat16(), row, 7, 3, history=(y * 0.5, y * 0.25))
            ops.q_sample(y, torch.rand(2, device="cuda") * 0.8 + 0.1, 7, 3)
            ops.noise((2, 13, *size), 5, step=2, device="cuda")
        for dtype in (torch.float32, torch.bfloat16):
            norms(new(2, 48, 17, 19, dtype=dtype).requires_grad_(), 16)
            norms(new(2, 40, 17, 19, dtype=dtype).requires_grad_(), 8, new(2, 24, 17, 19, dtype=dtype).requires_grad_())
            norms(new(1, 64, 64, 64, dtype=dtype).requires_grad_(), 32)  # a cluster of blocks on Hopper
            norms(new(2, 64, 128, 208, dtype=dtype).requires_grad_(), 32)  # a grid of them
torch.cuda.synchronize()
print("ran")
"""
HOMES = ("cuda", "triton")


def selections() -> dict[str, str]:
    """The tests of each home by their names' ids (tests/conftest.py), and all others."""
    ids = {f"{home} home": f"{home}-cuda" for home in ("cuda", "triton", "torch")}
    return {**ids, "the rest": " and ".join(f"not {name}" for name in ids.values())}


def run_tests(names: str, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "tests", "-m", "gpu", "-k", names, "-q"]
        options = ["--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):
            options += ["-n", str(workers)]
        done = run([*command, *options], OMP_NUM_THREADS="2")  # the parts share the cores
        if not report.exists():
            return {**done, "good": False}
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        failed = [c.get("name") for c in suite if c.find("failure") is not None or c.find("error") is not None]
        counts = {k: int(suite.get(k, "0")) for k in ("tests", "failures", "errors", "skipped")}
        ran = counts["tests"] - counts["skipped"] > 0
    return {**counts, "failed": failed, **done, "good": done["exit"] == 0 and ran}


def sanitize(tool: str, home: str) -> dict[str, Any]:
    if shutil.which("compute-sanitizer") is None:
        return {"good": True, "why": "compute-sanitizer is not installed: not run"}
    sanitizer = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    # each tensor its own allocation: one that runs past its end would else stay within torch's pool
    done = run([*sanitizer, sys.executable, "-P", "-c", SANITIZE, home], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {**done, "good": done["exit"] == 0 and "\nran\n" in done["tail"]}


def run(command: list[str], **variables: str) -> dict[str, Any]:
    """Exit status (None: past its time) and the end of what it printed."""
    begin = time.time()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code, output = None, stopped(process)
    return {"exit": code, "seconds": round(time.time() - begin, 1), "tail": output[-6000:]}


def stopped(process: subprocess.Popen[str]) -> str:
    """What it printed: an interrupt makes pytest say what it has."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=20)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def parts() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of each as it ends."""
    with ThreadPoolExecutor() as pool:
        running = {
            pool.submit(run_tests, names, WORKERS[part]): f"tests, {part}" for part, names in selections().items()
        }
        for tool in ("memcheck", "racecheck"):
            running |= {pool.submit(sanitize, tool, home): f"{tool}, {home} home" for home in HOMES}
        for future in as_completed(running):
            yield running[future], future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device: torch sees none", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name, result in parts():
        results[name] = result
        (out / "gpu-check.json").write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
        print(f"{'ok  ' if result['good'] else 'FAIL'} {name}, {result.get('seconds', 0)} s {result.get('failed', '')}")
        if not result["good"]:
            print(result.get("tail", ""))
    return 0 if all(result["good"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
