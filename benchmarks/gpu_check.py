"""The checks that need a GPU: the tests marked gpu, then compute-sanitizer over small shapes. Writes gpu-check.json."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from environment import environment

SANITIZE = """
import torch
from sr3fast import ops, backend
for home in ("cuda", "triton"):
    for layout in (torch.contiguous_format, torch.channels_last):
        with backend.use(home):
            y = torch.randn(2, 3, 33, 31, device="cuda").contiguous(memory_format=layout)
            ops.refine(y, torch.randn_like(y), 0.99, 0.5, 7, 3, origin=(1, 2))
            row = (1.2, 0.7, 1.0, 0.9, -0.2, 0.3, 0.1, -0.05, 0.4)
            ops.solver_step(y, torch.randn_like(y).bfloat16(), row, 7, 3, history=(y * 0.5, y * 0.25))
            ops.q_sample(y, torch.rand(2, device="cuda") * 0.8 + 0.1, 7, 3)
            for dtype in (torch.float32, torch.bfloat16):
                h = torch.randn(2, 48, 17, 19, device="cuda", dtype=dtype).contiguous(memory_format=layout)
                h = h.requires_grad_()
                w = torch.randn(48, device="cuda", requires_grad=True)
                b = torch.randn(48, device="cuda", requires_grad=True)
                ops.group_norm_silu(h, w, b, 16).float().square().sum().backward()
torch.cuda.synchronize()
print("ran")
"""


def run_tests(limit: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "tests", "-m", "gpu", "-q", f"--junitxml={report}"]
        code = subprocess.run(command, timeout=limit).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        failed = [c.get("name") for c in suite if c.find("failure") is not None or c.find("error") is not None]
        counts = {k: int(suite.get(k, "0")) for k in ("tests", "failures", "errors", "skipped")}
    return {"exit": code, **counts, "failed": failed}


def sanitize(tool: str, limit: float) -> dict[str, object]:
    if shutil.which("compute-sanitizer") is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-P", "-c", SANITIZE]
    done = subprocess.run(command, timeout=limit, capture_output=True, text=True)
    return {"ran": "ran" in done.stdout, "exit": done.returncode, "tail": (done.stdout + done.stderr)[-1500:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device: torch sees none", file=sys.stderr)
        return 2
    start = time.time()
    result: dict[str, object] = {"environment": environment(), "tests": run_tests(240)}
    for tool in ("memcheck", "racecheck"):
        result[tool] = sanitize(tool, 120)
    result["seconds"] = round(time.time() - start, 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    good = result["tests"]["exit"] == 0 and all(result[t].get("exit", 0) == 0 for t in ("memcheck", "racecheck"))  # type: ignore[index,attr-defined]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
