"""What Triton makes of kernels/ for sm_90, read without a GPU: no spills, 16-byte accesses, no fma in the noise.

TRITON_INTERPRET is read when a kernel is decorated, and Triton's driver is one a process, so another process
calls the home as a launch does, compiles in place of running (`python test_triton_compile.py FOLDER`), and leaves
the PTX and the machine code, which the tests read. Its tensors lie on torch's meta device: they have an address,
shapes, strides and a dtype, all that a launch specialises on, and take no memory.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import sass  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROW = (1.2, 0.7, 1.0, 0.9, -0.1, 0.3, 0.2, -0.4, 0.5)
UNFUSED = ("noise_kernel", "step_kernel", "q_sample_kernel")


# ----------------------------------------------------------------------------------------- in the other process


def meta(*shape, dtype=torch.float32, layout="nchw"):
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if layout == "nhwc" else t


def calls():
    """(name, what to call): every kernel in every layout and dtype, and each of its ways through."""
    from sr3fast import kernels

    number = lambda dtype=torch.float64, *shape: meta(*shape, dtype=dtype)  # noqa: E731
    host = torch.tensor

    for name, dtype in DTYPES.items():
        yield f"noise {name}", lambda d=dtype: kernels.noise((meta(8, 3, 128, 128, dtype=d),), 5, 3, 1, (0, 0))
    odd = (3, 6, 33, 31)
    yield "noise odd", lambda: kernels.noise((meta(*odd),), 5, 3, 1, (3, 5))
    seeds, seed, step = number(torch.int64, 8), number(torch.int64), number(torch.int64)
    yield "noise in memory", lambda: kernels.noise((meta(8, 3, 128, 128),), seeds, step, 1, (0, 0))

    # channels_last: whole lanes of C <= 4, tiles of 4 channels, and the strided rest
    for layout, channels in (("nchw", 3), *(("nhwc", c) for c in (1, 2, 3, 4, 16, 6))):
        shape = (8, channels, 128, 128)
        y = meta(*shape, layout=layout)
        for name, dtype in DTYPES.items():
            f = meta(*shape, dtype=dtype, layout=layout)
            what = f"{layout} {channels} {name}"
            yield (
                f"solver_step {what}",
                lambda y=y, f=f: kernels.solver_step(
                    (y, meta(*y.shape).as_strided(y.shape, y.stride()), None),
                    *(y, f, host(ROW), 5, 3, y, y, None, (0, 0)),
                ),
            )
            yield (
                f"refine {what}",
                lambda y=y, f=f: kernels.refine((y, None), y, f, 0.9, 0.5, 5, 3, None, (0, 0)),
            )
            yield (
                f"q_sample {what}",
                lambda f=f: kernels.q_sample((f, f, None), f, host(0.3, dtype=torch.float64), 5, 3, None, (0, 0)),
            )
        # a network's buffers: some of 8 channels, channels_last
        buffer = meta(8, channels + 5, 128, 128, dtype=torch.bfloat16, layout="nhwc")[:, 1 : 1 + channels]
        yield (
            f"refine into {layout} {channels}",
            lambda y=y, b=buffer: kernels.refine((y, b), y, b, number(), number(), seeds, step, None, (0, 0)),
        )
        yield (
            f"solver_step into {layout} {channels}",
            lambda y=y, b=buffer: kernels.solver_step(
                (y, y, b), y, b, number(torch.float32, 9), seed, step, y, y, None, (0, 0)
            ),
        )
        yield (
            f"q_sample into {layout} {channels}",
            lambda y=y, b=buffer: kernels.q_sample((y, y, b), y, number(torch.float64, 8), seeds, step, None, (0, 0)),
        )
        yield (
            f"given {layout} {channels}",
            lambda y=y: (
                kernels.refine((y, None), y, y, 0.9, 0.5, 5, 3, y, (0, 0)),
                kernels.solver_step((y, y, None), y, y, number(torch.float32, 9), 5, 3, y, y, y, (0, 0)),
                kernels.q_sample((y, None, None), y, number(), 5, 3, y, (0, 0)),
            ),
        )
    for layout in ("nchw", "nhwc"):
        y = meta(*odd, layout=layout)
        yield (
            f"odd {layout}",
            lambda y=y: (
                kernels.solver_step((y, y, None), y, y, host(ROW), 5, 3, y, y, None, (3, 5)),
                kernels.q_sample((y, y, None), y, host(0.3, dtype=torch.float64), 5, 3, None, (3, 5)),
            ),
        )

    sizes = {"small": (8, 64, 16, 16), "large": (8, 64, 256, 128), "odd": (3, 37, 33, 31)}
    for layout in ("nchw", "nhwc"):
        for name, dtype in DTYPES.items():
            for size, shape in sizes.items():
                h = meta(*shape, dtype=dtype, layout=layout)
                yield f"norm {size} {layout} {name}", lambda h=h: norms(kernels, h)


def norms(kernels, h):
    """Forward and backward of a tensor, a pair, a sum."""
    b, c = h.shape[:2]
    groups = 32 if c % 32 == 0 else 1
    p, shift = meta(c, dtype=h.dtype), meta(b, c, dtype=h.dtype)
    wp, wshift = meta(c), meta(b, c)
    moment = meta(b, groups)
    h2 = meta(*h.shape, dtype=h.dtype, layout="nchw" if h.is_contiguous() else "nhwc")
    both = meta(b, 2 * c, *h.shape[2:], dtype=h.dtype, layout="nchw" if h.is_contiguous() else "nhwc")
    p2, moment2, shift2 = meta(2 * c, dtype=h.dtype), meta(b, 2 * groups), meta(b, 2 * c, dtype=h.dtype)
    for silu, s in ((True, shift), (False, None)):
        kernels.group_norm_silu((h, moment, moment), h, None, p, p, groups, 1e-5, s, silu)
        kernels.add_group_norm_silu((h, h, moment, moment), h, h2, p, p, groups, 1e-5, s, silu)
        grads = (h, None, wp, wp, None if s is None else wshift)
        for grad_s in (None, h):
            kernels.group_norm_silu_backward(grads, h, h, None, p, p, moment, moment, groups, s, silu, grad_s)
    kernels.group_norm_silu((both, moment2, moment2), h, h2, p2, p2, 2 * groups, 1e-5, shift2, True)
    grads = (h, h2, meta(2 * c), meta(2 * c), meta(b, 2 * c))
    kernels.group_norm_silu_backward(
        grads, both, h, h2, p2, p2, moment2, moment2, 2 * groups, shift2, True, None
    )
