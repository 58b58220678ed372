"""The compiled homes: each op is one call into sr3fast/_C, which reads the tensors itself (csrc/bindings.cpp).

`cpp()` and `cuda()` give a home each; both have the ops of `backend.OPS` as f(outs, *inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch  # before _C, so that one OpenMP runtime serves both
from torch import Tensor

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
        self._f.noise(*outs, seed, step, domain, origin, self._exec(outs[0].device))

    def refine(self, outs, y_t, *inputs):
        self._f.refine(*outs, y_t, *inputs, self._exec(y_t.device))

    def solver_step(self, outs, y, *inputs):
        self._f.solver_step(*outs, y, *inputs, self._exec(y.device))

    def q_sample(self, outs, y_0, gamma, *inputs):
        self._f.q_sample(*outs, y_0, gamma, gamma.ndim == 1, *inputs, self._exec(y_0.device))

    def group_norm_silu(self, outs, h, h2, weight, bias, groups, eps, shift, silu):
        out, mean, rstd = outs
        on, _scratch = self._norm_exec(h, out.shape[1])
        self._f.group_norm_silu(out, None, mean, rstd, (h, h2, None, weight, bias, shift, groups, eps, silu), on)

    def add_group_norm_silu(self, outs, h, residual, weight, bias, groups, eps, shift, silu):
        on, _scratch = self._norm_exec(h, h.shape[1])
        self._f.group_norm_silu(*outs, (h, None, residual, weight, bias, shift, groups, eps, silu), on)

    def group_norm_silu_backward(self, outs, grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s):
        on, _scratch = self._norm_exec(h, grad.shape[1])
        norm = (h, h2, None, weight, bias, shift, groups, 0.0, silu)
        self._f.group_norm_silu_backward(*outs, grad, grad_s, mean, rstd, norm, on)


class CppHome(Home):
    """The C++ home, which has a convolution for the engine too."""

    def fast_conv3x3(self) -> bool:
        """Whether `conv3x3` was measured to be faster than oneDNN's, on this instruction set."""
        return self._f.isa() != "baseline"

    def conv3x3_pack(self, weight: Tensor) -> Tensor:
        """weight [N, C, 3, 3], float32, as `conv3x3` reads it."""
        N, C = weight.shape[:2]
        packed = weight.new_empty(-(-N // 32), 36, C, 32)
        self._f.conv3x3_pack(packed, weight.contiguous(), torch.get_num_threads())
        return packed

    def conv3x3(
        self,
        out: Tensor,
        h: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        onto: Tensor | None,
        scratch: Callable[[int], Tensor],
    ) -> None:
        """out = weight * h + bias + onto, of stride 1 (csrc/cpu/conv3x3.h).

        All are float32 and channels_last: its only caller, the engine, sees to that.

        scratch(n): memory of n floats at least, to work in.
        """
        threads = torch.get_num_threads()
        memory = scratch(self._f.conv3x3_scratch(out, h, threads))
        self._f.conv3x3(out, h, packed, bias, onto, (threads, 0, 0, memory.data_ptr()))


try:
    from ._C import is_plain_step  # type: ignore[attr-defined]
except ImportError:

    def is_plain_step(out: Tensor, y: Tensor, eps_hat: Tensor) -> bool:
        """Is it a step's common call, with no tensor to check? csrc/bindings.cpp knows; False only costs time."""
        return False


def _module() -> ModuleType:
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            f"the compiled module sr3fast._C is not there ({error}): install with a C++ compiler "
            "(GCC 9, Clang 13 or newer), `pip install -e .`"
        ) from error
    return _C


def cpp() -> CppHome:
    """The C++ home, for CPU tensors. ImportError says why it is not there."""
    functions = _module().cpu
    threads = "OpenMP" if functions.openmp else "one thread: it was built without OpenMP"
    return CppHome(functions, lambda device: (torch.get_num_threads(), 0, 0, 0), f"{functions.isa()}, {threads}")


def cuda() -> Home:
    """The CUDA home. ImportError says why it is not there, or why this machine cannot run it."""
    functions = getattr(_module(), "cuda", None)
    if functions is None:
        raise ImportError("this build has no CUDA kernels: it was installed without nvcc (of CUDA 12.0 or newer)")
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
