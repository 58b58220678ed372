"""How torch knows the ops: schema, implementation, fake kernel and gradient of each, with torch.library.

Arguments are those that `ops.py` has checked. An implementation makes the outputs and asks `backend` for the home that
fills them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backend
from .contract import PLAIN, as_dense, in_forward_mode, layout_of


def watched(y: Tensor | None = None, *others: Tensor | None) -> bool:
    """Does the call need torch's dispatcher: for torch.compile, a tensor subclass, meta tensors, forward mode, a
    negation that torch has put off? Else, for inference, it goes straight to the home, which saves a third of a small
    call."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or in_forward_mode() or torch.jit.is_tracing():
        return True
    if y is not None and y.is_meta:
        return True
    for t in (y, *others):  # noqa: SIM110 (twice as fast as any())
        if t is not None and (type(t) not in PLAIN or t.is_neg()):
            return True
    return False


def dispatch(op: str, inputs: Sequence, *outs: Tensor | None) -> None:
    """Through torch's dispatcher; negations are carried out before it, which knows none beside a None."""
    if not torch.compiler.is_compiling() and any(t.is_neg() for t in outs if t is not None):
        raise ValueError("out= and into= must not be views that negate (torch.Tensor.is_neg)")
    inputs = [t.resolve_neg() if isinstance(t, Tensor) else t for t in inputs]
    getattr(torch.ops.sr3fast, op)(*inputs, *outs)


def _written(*tensors: Tensor | None) -> None:
    """Tell autograd, as every in-place operation does: who saved one of them for a backward pass gets an error."""
    for t in tensors:
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)


# ---------------------------------------------------------------------------------------------------------
# Schema, implementation, fake kernel

_library = torch.library.Library("sr3fast", "DEF")

_STEP = "Tensor seed, Tensor step"
_PLACE = "SymInt h0, SymInt w0"
_NORM = "Tensor weight, Tensor bias, int groups, float eps, Tensor? shift, bool silu"
_library.define(f"noise({_STEP}, SymInt[] shape, int domain, {_PLACE}, ScalarType dtype, Device device) -> Tensor")
_refine = f"Tensor y_t, Tensor eps_hat, Tensor alpha_t, Tensor gamma_t, {_STEP}, Tensor? z, {_PLACE}"
_library.define(f"refine({_refine}) -> Tensor")
_library.define(f"refine_out({_refine}, Tensor(a!) out, Tensor(b!)? into) -> ()")
_solver_step = f"Tensor y, Tensor eps_hat, Tensor row, {_STEP}, Tensor? m1, Tensor? m2, Tensor? z, {_PLACE}"
_library.define(f"solver_step({_solver_step}) -> (Tensor, Tensor)")
_library.define(f"solver_step_out({_solver_step}, Tensor(a!) out, Tensor(b!)? m, Tensor(c!)? into) -> ()")
_q_sample = f"Tensor y_0, Tensor gamma, {_STEP}, Tensor? eps, {_PLACE}"
_library.define(f"q_sample({_q_sample}) -> (Tensor, Tensor)")
_library.define(f"q_sample_out({_q_sample}, Tensor(a!) out, Tensor(b!)? eps_out, Tensor(c!)? into) -> ()")
_library.define(f"group_norm_silu(Tensor h, Tensor? h2, {_NORM}) -> (Tensor, Tensor, Tensor)")
_library.define(f"add_group_norm_silu(Tensor h, Tensor residual, {_NORM}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "group_norm_silu_backward(Tensor grad, Tensor h, Tensor? h2, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor rstd, int groups, Tensor? shift, bool silu, Tensor? grad_s) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _implement(op: str):
    """Register the function as the op's kernel on every device."""

    def register(function):
        _library.impl(op, function, "CompositeExplicitAutograd")
        return function

    return register


def _fake(op: str):
    return torch.library.register_fake(f"sr3fast::{op}", lib=_library)


@_implement("noise")
def noise_of(seed, step, shape, domain, h0, w0, dtype, device):
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel() > 0:
        backend.find("noise", out.device)((out,), seed, step, domain, (h0, w0))
    return out


@_fake("noise")
def _noise_fake(seed, step, shape, domain, h0, w0, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


@_implement("refine_out")
def refine_out(y_t, eps_hat, alpha_t, gamma_t, seed, step, z, h0, w0, out, into):
    if y_t.numel() > 0:
        run = backend.find("refine", y_t.device)
        run((out, into), y_t, eps_hat, alpha_t, gamma_t, seed, step, z, (h0, w0))
        _written(out, into)


@_implement("refine")
def _refine_new(y_t, *args):
    out = torch.empty_like(y_t)
    refine_out(y_t, *args, out, None)
    return out


@_implement("solver_step_out")
def solver_step_out(y, eps_hat, row, seed, step, m1, m2, z, h0, w0, out, m, into):
    if y.numel() > 0:
        run = backend.find("solver_step", y.device)
        run((out, m, into), y, eps_hat, row, seed, step, m1, m2, z, (h0, w0))
        _written(out, m, into)


@_implement("solver_step")
def _solver_step_new(y, *args):
    out, m = torch.empty_like(y), torch.empty_like(y)
    solver_step_out(y, *args, out, m, None)
    return out, m


@_implement("q_sample_out")
def q_sample_out(y_0, gamma, seed, step, eps, h0, w0, out, eps_out, into):
    if y_0.numel() > 0:
        run = backend.find("q_sample", y_0.device)
        run((out, eps_out, into), y_0, gamma, seed, step, eps, (h0, w0))
        _written(out, eps_out, into)


@_implement("q_sample")
def _q_sample_new(y_0, gamma, seed, step, eps, h0, w0):
    out, eps_out = torch.empty_like(y_0), torch.empty_like(y_0) if eps is None else None
    q_sample_out(y_0, gamma, seed, step, eps, h0, w0, out, eps_out, None)
    return out, y_0.new_empty(0) if eps_out is None else eps_out


@_fake("refine")
def _refine_fake(y_t, *args):
    return torch.empty_like(y_t)


@_fake("solver_step")
def _solver_step_fake(y, *args):
    return torch.empty_like(y), torch.empty_like(y)


@_fake("q_sample")
def _q_sample_fake(y_0, gamma, seed, step, eps, h0, w0):
    return torch.empty_like(y_0), torch.empty_like(y_0) if eps is None else y_0.new_empty(0)


for _op in ("refine_out", "solver_step_out", "q_sample_out"):
    _fake(_op)(lambda *args: None)


def _norm_outputs(h, h2, groups):
    channels = h.shape[1] + (0 if h2 is None else h2.shape[1])
    shape = (h.shape[0], channels, *h.shape[2:])
    out = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=layout_of(h))
    mean = torch.empty((h.shape[0], groups), dtype=torch.float32, device=h.device)
    return out, mean, torch.empty_like(mean)


@_fake("group_norm_silu")
def _group_norm_silu_fake(h, h2, weight, bias, groups, eps, shift, silu):
    return _norm_outputs(h, h2, groups)


@_implement("group_norm_silu")
def _group_norm_silu(h, h2, weight, bias, groups, eps, shift, silu):
    out, mean, rstd = _norm_outputs(h, h2, groups)
    if out.numel() > 0:
        run = backend.find("group_norm_silu", h.device)
        run((out, mean, rstd), h, h2, weight, bias, groups, eps, shift, silu)
    return out, mean, rstd


@_fake("add_group_norm_silu")
def _add_group_norm_silu_fake(h, residual, weight, bias, groups, eps, shift, silu):
    out, mean, rstd = _norm_outputs(h, None, groups)
    return out, torch.empty_like(out), mean, rstd


@_implement("add_group_norm_silu")
def _add_group_norm_silu(h, residual, weight, bias, groups, eps, shift, silu):
    out, mean, rstd = _norm_outputs(h, None, groups)
    s = torch.empty_like(out)
    if out.numel() > 0:
        run = backend.find("add_group_norm_silu", h.device)
        run((out, s, mean, rstd), h, residual, weight, bias, groups, eps, shift, silu)
    return out, s, mean, rstd


@_fake("group_norm_silu_backward")
def _group_norm_silu_backward_outputs(grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s):
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=h.device)
    batch = 0 if shift is None else h.shape[0]
    dshift = torch.empty((batch, weight.shape[0]), dtype=torch.float32, device=h.device)
    dh2 = h.new_empty(0) if h2 is None else torch.empty_like(h2)
    return torch.empty_like(h), dh2, dweight, torch.empty_like(dweight), dshift


@_implement("group_norm_silu_backward")
def _group_norm_silu_backward(grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s):
    if shift is not None and grad_s is not None:
        raise ValueError("grad_s is the gradient of a sum, which has its shift in it: got a shift too")
    outs = _group_norm_silu_backward_outputs(grad, h, h2, weight, bias, mean, rstd, groups, shift, silu, grad_s)
    dh, dh2, dweight, dbias, dshift = outs
    if dh.numel() == 0:
        return dh, dh2, dweight.zero_(), dbias.zero_(), dshift.zero_()
    run = backend.find("group_norm_silu_backward", h.device)
    run(
        (dh, None if h2 is None else dh2, dweight, dbias, None if shift is None else dshift),
        *(as_dense(grad, layout_of(h)), h, h2, weight, bias, mean, rstd, groups, shift, silu),
        None if grad_s is None else as_dense(grad_s, layout_of(h)),
    )
    return outs


# ---------------------------------------------------------------------------------------------------------
# Gradients


def _save_refine(ctx, inputs, output):
    _, eps_hat, alpha, gamma, _, step, z, _, _ = inputs
    ctx.save_for_backward(alpha, gamma, step)
    ctx.eps_dtype, ctx.has_z = eps_hat.dtype, z is not None


def _refine_backward(ctx, grad):
    from .reference import refine_row

    alpha, gamma, step = ctx.saved_tensors
    row = refine_row(alpha, gamma, step).to(grad.device)
    dz = grad * row[8] if ctx.has_z and ctx.needs_input_grad[6] else None
    return grad * row[3], (grad * row[4]).to(ctx.eps_dtype), None, None, None, None, dz, None, None


def _save_solver_step(ctx, inputs, output):
    y, eps_hat, row, _, _, m1, m2, z, _, _ = inputs
    ctx.save_for_backward(y, eps_hat, row)
    ctx.given = (m1 is not None, m2 is not None, z is not None)


def _solver_step_backward(ctx, grad_y, grad_m):
    y, eps_hat, row = ctx.saved_tensors
    recip, ratio, clip, a, b, c0, c1, c2, s = row.to(y.device).unbind()
    inside = (recip * y - ratio * eps_hat.float()).abs() <= clip
    dm = torch.where(inside, c0 * grad_y + grad_m, 0.0)
    dm1, dm2, dz = (k * grad_y if g else None for k, g in zip((c1, c2, s), ctx.given, strict=True))
    deps = (b * grad_y - ratio * dm).to(eps_hat.dtype)
    return a * grad_y + recip * dm, deps, None, None, None, dm1, dm2, dz, None, None


def _save_q_sample(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.has_eps = inputs[4] is not None


def _q_sample_backward(ctx, grad, grad_eps):
    gamma = ctx.saved_tensors[0].view(-1, 1, 1, 1)
    signal, sigma = (square.sqrt().to(grad.dtype).to(grad.device) for square in (gamma, 1 - gamma))
    deps = grad * sigma if ctx.has_eps and ctx.needs_input_grad[4] else None
    return grad * signal, None, None, None, deps, None, None


def _forced_again(ctx):
    """The home that was forced around the forward pass: autograd may call from a thread of its own."""
    return contextlib.nullcontext() if ctx.home is None else backend.use(ctx.home)


def _save_norm(ctx, inputs, output):
    ctx.home = backend.forced()
    h, h2, weight, bias, groups, _, shift, silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(h, h2, weight, bias, mean, rstd, shift)
    ctx.groups, ctx.silu = groups, silu


def _norm_backward(ctx, grad, grad_mean, grad_rstd):
    h, h2, weight, bias, mean, rstd, shift = ctx.saved_tensors
    with _forced_again(ctx):
        dh, dh2, dweight, dbias, dshift = torch.ops.sr3fast.group_norm_silu_backward(
            grad, h, h2, weight, bias, mean, rstd, ctx.groups, shift, ctx.silu, None
        )
    return (
        dh,
        None if h2 is None else dh2,
        *(dweight.to(weight.dtype), dbias.to(bias.dtype), None, None),
        *(None if shift is None else dshift.to(shift.dtype), None),
    )


def _save_add_norm(ctx, inputs, output):
    ctx.home = backend.forced()
    _, _, weight, bias, groups, _, shift, silu = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(s, weight, bias, mean, rstd)
    ctx.groups, ctx.silu, ctx.shift_dtype = groups, silu, None if shift is None else shift.dtype


def _add_norm_backward(ctx, grad, grad_s, grad_mean, grad_rstd):
    s, weight, bias, mean, rstd = ctx.saved_tensors
    with _forced_again(ctx):
        ds, _, dweight, dbias, _ = torch.ops.sr3fast.group_norm_silu_backward(
            grad, s, None, weight, bias, mean, rstd, ctx.groups, None, ctx.silu, grad_s
        )
    dshift = None if ctx.shift_dtype is None else ds.sum((2, 3), dtype=torch.float32).to(ctx.shift_dtype)
    return ds, ds, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, dshift, None


def _twice(ctx, *grads):
    raise RuntimeError("group_norm_silu has no second derivative: use F.silu(F.group_norm(...)) for that")


for _op, _backward, _save in (
    ("refine", _refine_backward, _save_refine),
    ("solver_step", _solver_step_backward, _save_solver_step),
    ("q_sample", _q_sample_backward, _save_q_sample),
    ("group_norm_silu", _norm_backward, _save_norm),
    ("add_group_norm_silu", _add_norm_backward, _save_add_norm),
    ("group_norm_silu_backward", _twice, None),
):
    torch.library.register_autograd(f"sr3fast::{_op}", _backward, setup_context=_save, lib=_library)
