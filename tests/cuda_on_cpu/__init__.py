"""The CUDA home on an emulated GPU (emulate.h): csrc/cuda compiled for the CPU, behind `sr3fast.native.Home`.

What a GPU alone can show (speed, the compiler's code, races that an order of threads does not bring out) it cannot.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sr3fast import native

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc" / "cuda"
CANDIDATES = HERE.parent.parent / "benchmarks" / "candidates"
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"),
    *("-DSR3FAST_EMULATE", f"-I{HERE}"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    # a misaligned vector, an index out of an array or an overflow stops the process
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
)
FORWARD, BACKWARD, SHUFFLED = range(3)  # the order in which threads run


def compiler() -> str | None:
    return shutil.which("g++")


def build(folder: Path) -> Path:
    """Compile the emulated home; the path of the library."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler(), *FLAGS, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sorted(SOURCES.glob("*.cu")), HERE / "home.cpp"]))
    library = folder / "cuda_on_cpu.so"
    subprocess.run([compiler(), "-shared", "-o", library, *objects], check=True)
    return library


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )


class _Vector(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int))


def _scalar_type(value):
    return type("_Scalar", (ctypes.Structure,), {"_fields_": (("value", value), ("device", ctypes.c_void_p))})


_Int = _scalar_type(ctypes.c_int64)
_Double = _scalar_type(ctypes.c_double)
_Row = _scalar_type(ctypes.c_float * 9)


class _Seeds(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int64), ("device", ctypes.c_void_p), ("per_sample", ctypes.c_bool))


class _Origin(ctypes.Structure):
    _fields_ = (("h", ctypes.c_int64), ("w", ctypes.c_int64))


class _Exec(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_int),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("h", _Tensor),
        ("h2", _Tensor),
        ("residual", _Tensor),
        ("weight", _Vector),
        ("bias", _Vector),
        ("shift", _Vector),
        ("groups", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("silu", ctypes.c_bool),
    )


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _tensor(t: torch.Tensor | None) -> _Tensor:
    if t is None:
        return _Tensor()
    four = ctypes.c_int64 * 4
    return _Tensor(t.data_ptr(), _DTYPES.index(t.dtype), four(*t.shape), four(*t.stride()))


def _vector(t: torch.Tensor | None) -> _Vector:
    return _Vector() if t is None else _Vector(t.data_ptr(), _DTYPES.index(t.dtype))


def _norm(h, h2, residual, weight, bias, shift, groups, eps, silu) -> _Norm:
    images = (_tensor(t) for t in (h, h2, residual))
    return _Norm(*images, *(_vector(v) for v in (weight, bias, shift)), groups, eps, silu)


class Functions:
    """What `sr3fast._C.cuda` offers, from the emulated library."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.scratch_bytes.restype = ctypes.c_int64
        self._library.quotient.restype = ctypes.c_uint32
        self.in_memory = False  # scalars are read by the kernel, as from device memory
        self._numbers: list = []

    def schedule(self, order: int) -> None:
        """The order in which threads run, and counters back to 0."""
        self._library.emulate_schedule(order)
        self._library.emulate_forget()

    @property
    def launches(self) -> int:
        return self._library.emulate_launches()

    @property
    def largest_cluster(self) -> int:
        return self._library.emulate_largest_cluster()

    @property
    def grids(self) -> int:
        """Launches whose blocks all run at once."""
        return self._library.emulate_grids()

    @property
    def told(self) -> int:
        """How often a kernel was told what it may have."""
        return self._library.emulate_told()

    @property
    def asked(self) -> int:
        """Kernels and devices whose clusters were asked about."""
        return self._library.emulate_asked()

    def quotient(self, n: int, divisor: int) -> int:
        """csrc/common/divide.h"""
        return self._library.quotient(ctypes.c_uint32(n), ctypes.c_int64(divisor))

    def scratch_bytes(self, *shape: int) -> int:
        return self._library.scratch_bytes(*(ctypes.c_int64(n) for n in shape))

    def _call(self, name, *arguments):
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        error = function(*(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments))
        if error is not None:
            raise RuntimeError(error.decode())

    def _scalar(self, kind, scalar):
        number = kind._fields_[0][1]
        if isinstance(scalar, torch.Tensor):
            address = scalar.data_ptr()
        else:
            self._numbers = [*self._numbers[-16:], number(scalar)]  # alive until the call is long over
            address = ctypes.addressof(self._numbers[-1])
        if self.in_memory:
            return kind(device=address)
        value = number.from_address(address)
        return kind(value if kind is _Row else value.value)

    def _seeds(self, seeds) -> _Seeds:
        if isinstance(seeds, torch.Tensor) and seeds.ndim == 1:
            return _Seeds(0, seeds.data_ptr(), True)
        one = self._scalar(_Int, seeds)
        return _Seeds(one.value, one.device, False)

    def noise(self, out, seed, step, domain, origin, on):
        place = (_Origin(*origin), _Exec(*on))
        self._call("noise", _tensor(out), self._seeds(seed), self._scalar(_Int, step), domain, *place)

    def refine(self, out, into, y, eps_hat, alpha, gamma, seed, step, z, origin, on):
        self._call(
            "refine",
            *(_tensor(t) for t in (out, into, y, eps_hat)),
            *(self._scalar(_Double, alpha), self._scalar(_Double, gamma), self._seeds(seed)),
            *(self._scalar(_Int, step), _tensor(z), _Origin(*origin), _Exec(*on)),
        )

    def solver_step(self, out, m, into, y, eps_hat, row, seed, step, m1, m2, z, origin, on):
        self._call(
            "solver_step",
            *(_tensor(t) for t in (out, m, into, y, eps_hat)),
            *(self._scalar(_Row, row), self._seeds(seed), self._scalar(_Int, step)),
            *(_tensor(m1), _tensor(m2), _tensor(z), _Origin(*origin), _Exec(*on)),
        )

    def q_sample(self, out, eps_out, into, y_0, gamma, per_sample, seed, step, eps, origin, on):
        gamma = _Double(device=gamma.data_ptr()) if per_sample else self._scalar(_Double, gamma)
        self._call(
            "q_sample",
            *(_tensor(t) for t in (out, eps_out, into, y_0)),
            *(gamma, int(per_sample), self._seeds(seed), self._scalar(_Int, step), _tensor(eps)),
            *(_Origin(*origin), _Exec(*on)),
        )

    def group_norm_silu(self, out, s, mean, rstd, norm, on):
        arguments = (_tensor(out), _tensor(s), *_arrays(mean, rstd), _norm(*norm), _Exec(*on))
        self._call("group_norm_silu", *arguments)

    def group_norm_silu_backward(self, dh, dh2, dweight, dbias, dshift, grad, grad_s, mean, rstd, norm, on):
        self._call(
            "group_norm_silu_backward",
            *(_tensor(dh), _tensor(dh2), *_arrays(dweight, dbias, dshift), _tensor(grad), _tensor(grad_s)),
            *(*_arrays(mean, rstd), _norm(*norm), _Exec(*on)),
        )


def _arrays(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


class Candidates:
    """benchmarks/candidates on a device of few multiprocessors."""

    def __init__(self, folder: Path):
        names = ("group_norm_silu_lag", "group_norm_silu_backward_lag")

        def build_one(name: str) -> ctypes.CDLL:
            library = folder / f"{name}.so"
            command = [compiler(), *FLAGS, "-O0", "-shared", "-o", library, CANDIDATES / f"{name}.cu"]
            subprocess.run(command, check=True)
            return ctypes.CDLL(str(library))

        with ThreadPoolExecutor(2) as pool:
            self._libraries = dict(zip(names, pool.map(build_one, names), strict=True))

    def _call(self, name, arguments, norm, schedule):
        library = self._libraries[name]
        library.emulate_schedule(schedule)
        scratch = torch.full((1 << 20,), float("nan"))
        on = _Exec(0, 0, None, scratch.data_ptr())
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        structures = (*arguments, _norm(*norm), on)
        error = function(*(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in structures))
        if error is not None:
            raise RuntimeError(error.decode())

    def forward(self, outs, norm, schedule):
        out, s, mean, rstd = outs
        self._call("group_norm_silu_lag", (_tensor(out), _tensor(s), *_arrays(mean, rstd)), norm, schedule)

    def backward(self, tensors, norm, schedule):
        dh, dh2, dweight, dbias, dshift, grad, grad_s, mean, rstd = tensors
        arrays, images = _arrays(dweight, dbias, dshift), (_tensor(grad), _tensor(grad_s))
        arguments = (_tensor(dh), _tensor(dh2), *arrays, *images, *_arrays(mean, rstd))
        self._call("group_norm_silu_backward_lag", arguments, norm, schedule)


class Home(native.Home):
    """The CUDA home on device `index` of emulate.h's table, for tensors on the CPU."""

    def __init__(self, functions: Functions, index: int = 0):
        super().__init__(functions, lambda _: (0, index, 0, 0), "emulated")

    def _norm_exec(self, h, channels):
        scratch = torch.full((self._f.scratch_bytes(h.shape[0], channels, *h.shape[2:]) // 4,), float("nan"))
        return (*self._exec(h.device)[:3], scratch.data_ptr()), scratch
