"""The compiled homes: tensors to addresses and sizes, then one call into sr3fast/_C.

`cpp()` and `cuda()` give a home each; both have the ops of `backend.OPS` as f(outs, *inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch  # before _C, so that one OpenMP runtime serves both
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _image(t: Tensor | None) -> tuple[int, ...] | None:
    if t is None:
        return None
    return (t.data_ptr(), _DTYPES[t.dtype], *t.shape, *t.stride())


def _twin(t: Tensor | None, image: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Of a tensor with the dtype and layout of another, whose `_image` is at hand: a third of the time."""
    return None if t is None or image is None else (t.data_ptr(), *image[1:])


def _vector(t: Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (t.data_ptr(), _DTYPES[t.dtype])


def _scalar(value: float | Tensor) -> float | tuple[int, bool]:
    """A number, or where it is and whether it can be read there now."""
    return (value.data_ptr(), value.device.type == "cpu") if isinstance(value, Tensor) else value


def _seeds(seed: int | Tensor) -> int | tuple[int, bool, bool]:
    """As `_scalar`, and whether there is one a sample: those are read where they are."""
    if not isinstance(seed, Tensor):
        return seed
    a_sample = seed.ndim == 1
    return seed.data_ptr(), seed.device.type == "cpu" and not a_sample, a_sample


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


# threads, device index, stream, scratch memory
Exec = tuple[int, int, int, int]


class Home:
    """One of the two compiled homes: `functions` is _C.cpu or _C.cuda, `exec_on(device)` says where and how to run."""

    def __init__(self, functions: ModuleType, exec_on: Callable[[torch.device], Exec], about: str):
        self._f, self._exec, self._about = functions, exec_on, about

    def description(self) -> str:
        return self._about

    def _norm_exec(self, h: Tensor, channels: int) -> tuple[Exec, Tensor | None]:
        """Where to run, and the scratch memory a norm works in, to be held until it was launched."""
        threads, index, stream, _ = self._exec(h.device)
        if h.device.type == "cpu":
            return (threads, index, stream, 0), None
        size = self._f.scratch_bytes(h.shape[0], channels, *h.shape[2:])
        scratch = torch.empty(size, dtype=torch.uint8, device=h.device)
        return (threads, index, stream, scratch.data_ptr()), scratch

    def noise(self, outs, seed, step, domain, origin):
        (out,) = outs
        self._f.noise(_image(out), _seeds(seed), _scalar(step), domain, origin, self._exec(out.device))

    def refine(self, outs, y_t, eps_hat, alpha, gamma, seed, step, z, origin):
        out, into = outs
        y = _image(y_t)
        self._f.refine(
            *(_twin(out, y), _image(into), y, _image(eps_hat), _scalar(alpha), _scalar(gamma)),
            *(_seeds(seed), _scalar(step), _twin(z, y), origin, self._exec(y_t.device)),
        )

    def solver_step(self, outs, y, eps_hat, row, seed, step, m1, m2, z, origin):
        out, m, into = outs
        image = _image(y)
        self._f.solver_step(
            *(_twin(out, image), _twin(m, image), _image(into), image, _image(eps_hat), _scalar(row), _seeds(seed)),
            *(_scalar(step), *(_twin(t, image) for t in (m1, m2, z)), origin, self._exec(y.device)),
        )

    def q_sample(self, outs, y_0, gamma, seed, step, eps, origin):
        out, eps_out, into = outs
        y, a_sample = _image(y_0), gamma.ndim == 1
        self._f.q_sample(
            *(_twin(out, y), _twin(eps_out, y), _image(into), y),
            *((gamma.data_ptr(), False) if a_sample else _scalar(gamma), a_sample),
            *(_seeds(seed), _scalar(step), _twin(eps, y), origin, self._exec(y_0.device)),
        )

    def group_norm_silu(self, outs, h, h2, weight, bias, groups, eps, shift, silu):
        out, mean, rstd = outs
        self._norm(out, None, mean, rstd, h, h2, None, weight, bias, groups, eps, shift, silu)

    def add_group_norm_silu(self, outs, h, residual, weight, bias, groups, eps, shift, silu):
        out, s, mean, rstd = outs
        self._norm(out, s, mean, rstd, h, None, residual, weight, bias, groups, eps, shift, silu)

    def _norm(self, out, s, mean, rstd, h, h2, residual, weight, bias, groups, eps, shift, silu):
        on, _scratch = self._norm_exec(h, out.shape[1])
        norm = (_image(h), _image(h2), _image(residual), _vector(weight), _vector(bias), _vector(shift))
        self._f.group_norm_silu(
            *(_image(out), _image(s), _address(mean), _address(rstd), (*norm, groups, eps, silu), on)
        )

    def group_norm_silu_backward(self, outs, grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s):
        dh, dh2, dweight, dbias, dshift = outs
        on, _scratch = self._norm_exec(h, grad.shape[1])
        norm = (_image(h), _image(h2), None, _vector(weight), _vector(bias), _vector(shift))
        self._f.group_norm_silu_backward(
            *(_image(dh), _image(dh2), _address(dweight), _address(dbias), _address(dshift), _image(grad)),
            *(_image(grad_s), _address(mean), _address(rstd), (*norm, groups, 0.0, silu), on),
        )


def _module() -> ModuleType:
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            f"the compiled module sr3fast._C is not there ({error}): install with a C++ compiler, `pip install -e .`"
        ) from error
    return _C


def cpp() -> Home:
    """The C++ home, for CPU tensors. ImportError says why it is not there."""
    functions = _module().cpu
    return Home(functions, lambda device: (torch.get_num_threads(), 0, 0, 0), f"{functions.isa()}, OpenMP")


def cuda() -> Home:
    """The CUDA home. ImportError says why it is not there, or why this machine cannot run it."""
    functions = getattr(_module(), "cuda", None)
    if functions is None:
        raise ImportError("this build has no CUDA kernels: it was installed without nvcc")
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    driver, runtime = functions.driver_version(), functions.runtime_version()
    if driver < runtime:
        raise ImportError(f"the driver ({driver}) is older than the CUDA runtime this was built with ({runtime})")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise ImportError(f"the CUDA kernels need compute capability 8.0: this device has {capability}")

    def exec_on(device: torch.device) -> Exec:
        index = torch.cuda.current_device() if device.index is None else device.index
        return 0, index, torch.cuda.current_stream(device).cuda_stream, 0

    return Home(functions, exec_on, f"runtime {runtime}, driver {driver}, sm {functions.architectures}")
