"""What nvcc made of csrc/cuda: registers, spills, memory instructions. Needs nvcc, no GPU.

    python scripts/sass.py [sm_90]

`compile_kernels` gives the PTX and the machine code that tests/test_cuda_compile.py reads.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
UNFUSED = {"noise_step.cu", "q_sample.cu"}  # compiled with --fmad=false, as CMakeLists.txt has it


@dataclass
class Kernel:
    """One kernel's machine code: its demangled name, resources, and how often each memory instruction stands in it."""

    source: str
    name: str
    registers: int
    stack: int
    instructions: int
    memory: Counter[str] = field(default_factory=Counter)


def nvcc() -> str | None:
    return shutil.which("nvcc")


def cuobjdump() -> str | None:
    """CUDA's own, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def compile_kernels(folder: Path, arch: str = "sm_90") -> None:
    """Compile every file of csrc/cuda into folder/NAME.cubin and folder/NAME.ptx, nvcc's warnings as errors."""

    def compile_one(source: Path) -> None:
        flags = ["-std=c++17", "-O3", f"-arch={arch}", "-Werror=all-warnings"]
        if source.name in UNFUSED:
            flags.append("--fmad=false")
        kept = folder / f"{source.stem}.kept"
        kept.mkdir()
        command = [
            nvcc(),
            *flags,
            "-cubin",
            "--keep",
            "--keep-dir",
            kept,
            "-o",
            folder / f"{source.stem}.cubin",
            source,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
        (ptx,) = kept.glob("*.ptx")
        ptx.rename(folder / f"{source.stem}.ptx")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, SOURCES))


def read_kernels(folder: Path) -> list[Kernel]:
    """The kernels of every cubin that compile_kernels left in the folder."""
    return [k for source in SOURCES for k in read_cubin(folder / f"{source.stem}.cubin", source.name)]


def read_cubin(cubin: Path, source: str) -> list[Kernel]:
    usage = _dump("-res-usage", cubin)
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    kernels = []
    for part in _dump("-sass", cubin).split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", part)
        memory = Counter(i for i in code if re.match(r"(LDGSTS|LDG|STG|LDL|STL|LDS|STS|LD|ST)\b", i))
        kernels.append(Kernel(source, _demangle(mangled), *resources[mangled], len(code), memory))
    return kernels


def _dump(what: str, cubin: Path) -> str:
    return subprocess.run([cuobjdump(), what, cubin], check=True, capture_output=True, text=True).stdout


def _demangle(name: str) -> str:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is not None:
        name = subprocess.run([tool, name], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"sr3fast::cuda::|\(anonymous namespace\)::|^void ", "", name).split("(")[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        compile_kernels(Path(folder), *sys.argv[1:2])
        for k in read_kernels(Path(folder)):
            most = ", ".join(f"{name} {n}" for name, n in k.memory.most_common(6))
            print(f"{k.name:44} {k.registers:4} registers {k.stack:3} stack {k.instructions:5} instructions  {most}")


if __name__ == "__main__":
    main()
