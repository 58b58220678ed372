"""The contract of the ops: bad input is refused with rule and values; opcheck and torch.compile pass."""

import contextlib
import inspect
import math
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import nan_like, random, same_bits
from torch.autograd import forward_ad

from sr3fast import backend, ops
from sr3fast.native import is_plain_step
from sr3fast.schedule import Schedule
from sr3fast.solver import rows

ROW = (1.75, 0.6, 1.0, 0.9, -0.3, 0.25, -0.15, 0.05, 0.4)


def y(*shape, **options):
    return random(*(shape or (2, 3, 5, 7)), **options)


def refine(**changed):
    given = {"y_t": y(), "eps_hat": y(seed=1), "alpha_t": 0.9, "gamma_t": 0.5, "seed": 3, "step": 4} | changed
    return ops.refine(**given)


def solver_step(**changed):
    given = {
        "y": y(),
        "eps_hat": y(seed=1),
        "row": ROW,
        "seed": 3,
        "step": 4,
        "history": (y(seed=2), y(seed=3)),
    }
    return ops.solver_step(**(given | changed))


def q_sample(**changed):
    return ops.q_sample(**({"y_0": y(), "gamma": 0.5, "seed": 3} | changed))


def noise(**changed):
    return ops.noise(**({"shape": (2, 3, 5, 7), "seed": 3} | changed))


def norm(**changed):
    given = {"h": y(2, 4, 5, 7), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2}
    return ops.group_norm_silu(**(given | changed))


def add_norm(**changed):
    given = {
        "h": y(2, 4, 5, 7),
        "residual": y(2, 4, 5, 7),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "groups": 2,
    }
    return ops.add_group_norm_silu(**(given | changed))


def grad(t):
    return t.requires_grad_()


buffer = torch.zeros(2, 6, 5, 7)
flat = torch.zeros(3 * 210)
meta = torch.device("meta")

BAD = [
    # shapes
    (refine, {"y_t": y(3, 5, 7)}, ValueError, r"y_t must be \[B, C, H, W\]: got \(3, 5, 7\)"),
    (refine, {"eps_hat": y(2, 3, 5, 8)}, ValueError, r"eps_hat must have the shape .*got \(2, 3, 5, 8\)"),
    (refine, {"z": y(1, 3, 5, 7)}, ValueError, r"z must have the shape \(2, 3, 5, 7\): got \(1, 3, 5, 7\)"),
    (refine, {"out": y(2, 3, 5, 8)}, ValueError, r"out must have the shape"),
    (refine, {"into": y(2, 3, 5, 8)}, ValueError, r"into must have the shape"),
    (solver_step, {"history": (y(2, 3, 5, 8),)}, ValueError, r"history must have the shape"),
    (solver_step, {"history": (y(),) * 3}, ValueError, r"at most .* got 3 tensors"),
    (solver_step, {"row": ROW[:8]}, ValueError, r"nine numbers: got 8"),
    (solver_step, {"row": torch.tensor(ROW[:8])}, ValueError, r"float32 \[9\].*\(8,\)"),
    (solver_step, {"out": (None, y(2, 3, 5, 8))}, ValueError, r"m must have the shape"),
    (q_sample, {"y_0": y(5, 7)}, ValueError, r"y_0 must be \[B, C, H, W\]"),
    (q_sample, {"eps": y(2, 3, 5, 8)}, ValueError, r"eps must have the shape"),
    (
        q_sample,
        {"gamma": torch.full((3,), 0.5)},
        ValueError,
        r"one number or \[B\]: got \(3,\) for a batch of 2",
    ),
    (noise, {"shape": (3, 5, 7)}, ValueError, r"shape must be \[B, C, H, W\]: got \(3, 5, 7\)"),
    (noise, {"shape": (1, 65537, 1, 1)}, ValueError, r"at most 65536 channels: got 65537"),
    (noise, {"shape": (1, -1, 1, 1)}, ValueError, r"shape must be"),
    (norm, {"h": y(4, 5, 7)}, ValueError, r"h must be \[B, C, H, W\]"),
    (norm, {"h": (y(2, 2, 5, 7), y(2, 2, 5, 8))}, ValueError, r"a pair must agree but for the channels"),
    (norm, {"h": (y(2, 2, 5, 7), y(1, 2, 5, 7))}, ValueError, r"a pair must agree but for the channels"),
    (norm, {"h": (y(2, 4, 5, 7),)}, ValueError, r"h must be a tensor or a pair: got 1 of them"),
    (norm, {"h": (y(2, 1, 5, 7),) * 3}, ValueError, r"h must be a tensor or a pair: got 3 of them"),
    (q_sample, {"out": (y(), y(), y())}, ValueError, r"out must be a tensor or a pair: got 3 of them"),
    (norm, {"weight": torch.ones(5)}, ValueError, r"weight must have the shape \(4,\): got \(5,\)"),
    (norm, {"bias": torch.ones(5)}, ValueError, r"bias must have the shape \(4,\): got \(5,\)"),
    (norm, {"shift": torch.ones(4)}, ValueError, r"shift must have the shape \(2, 4\): got \(4,\)"),
    (add_norm, {"residual": y(2, 4, 5, 8)}, ValueError, r"residual must have the shape"),
    # dtypes and types
    (refine, {"y_t": y(dtype=torch.bfloat16)}, TypeError, r"y_t must be float32: got bfloat16"),
    (refine, {"y_t": y().double()}, TypeError, r"y_t must be float32: got float64"),
    (
        refine,
        {"eps_hat": y().double()},
        TypeError,
        r"eps_hat must be float32, float16, bfloat16: got float64",
    ),
    (refine, {"y_t": y().numpy()}, TypeError, r"y_t must be a tensor: got ndarray"),
    (refine, {"z": y().half()}, TypeError, r"z must be float32"),
    (refine, {"out": y().half()}, TypeError, r"out must be float32: got float16"),
    (refine, {"into": y().int()}, TypeError, r"into must be"),
    (refine, {"step": torch.tensor(4, dtype=torch.int32)}, TypeError, r"step tensor must hold one int64"),
    (refine, {"seed": "3"}, TypeError, r"seed must be an int"),
    (refine, {"seed": torch.tensor([3, 4], dtype=torch.int32)}, TypeError, r"must be int64"),
    (solver_step, {"row": torch.tensor(ROW).double()}, ValueError, r"float32 \[9\]"),
    (q_sample, {"y_0": y().double()}, TypeError, r"y_0 must be"),
    (q_sample, {"eps": y().half()}, TypeError, r"eps must have y_0's dtype: got torch.float16"),
    (q_sample, {"gamma": torch.tensor([1, 1])}, TypeError, r"gamma must be floating point"),
    (q_sample, {"out": y().half()}, TypeError, r"out must be float32"),
    (refine, {"step": 4.5}, TypeError, r"step must be an int: got float"),
    (refine, {"step": None}, TypeError, r"step must be an int: got NoneType"),
    (refine, {"step": 4.5, "out": y()}, TypeError, r"step must be an int: got float"),
    (refine, {"alpha_t": "0.9"}, TypeError, r"alpha_t must be a number or a tensor: got str"),
    (refine, {"alpha_t": None}, TypeError, r"alpha_t must be a number or a tensor: got NoneType"),
    (refine, {"gamma_t": torch.tensor(0.5 + 0j)}, TypeError, r"gamma_t must be real: got torch.complex64"),
    (refine, {"origin": (1.0, 0)}, TypeError, r"origin must be an int: got float"),
    (q_sample, {"gamma": [0.5, 0.5]}, TypeError, r"gamma must be a number or a tensor: got list"),
    (q_sample, {"gamma": y().numpy()}, TypeError, r"gamma must be a number or a tensor: got ndarray"),
    (noise, {"domain": 1.0}, TypeError, r"domain must be an int: got float"),
    (noise, {"seed": y().numpy()}, TypeError, r"seed must be an int, a sequence"),
    (norm, {"groups": 2.0}, TypeError, r"groups must be an int: got float"),
    (norm, {"weight": None}, TypeError, r"weight must be a tensor: got NoneType"),
    (norm, {"bias": np.ones(4)}, TypeError, r"bias must be a tensor: got ndarray"),
    (noise, {"dtype": torch.float64}, TypeError, r"got torch.float64"),
    (norm, {"h": y(2, 4, 5, 7).double()}, TypeError, r"h must be"),
    (norm, {"h": (y(2, 2, 5, 7), y(2, 2, 5, 7).half())}, TypeError, r"h\[1\] must be float32: got float16"),
    (norm, {"weight": torch.ones(4).double()}, TypeError, r"weight must be"),
    (add_norm, {"residual": y(2, 4, 5, 7).half()}, TypeError, r"residual must be float32"),
    # devices
    (refine, {"eps_hat": y().to(meta)}, ValueError, r"on one device: got eps_hat on meta"),
    (refine, {"z": y().to(meta)}, ValueError, r"on one device: got z on meta"),
    (refine, {"out": y().to(meta)}, ValueError, r"on one device: got out on meta"),
    (refine, {"into": y().to(meta)}, ValueError, r"on one device: got into on meta"),
    (
        refine,
        {"gamma_t": torch.tensor(0.5, device=meta)},
        ValueError,
        r"gamma_t must be on the host or on cpu: got meta",
    ),
    (
        refine,
        {"step": torch.tensor(3, device=meta)},
        ValueError,
        r"step must be on the host or on cpu: got meta",
    ),
    (solver_step, {"row": torch.tensor(ROW, device=meta)}, ValueError, r"row must be on the host"),
    (solver_step, {"history": (y().to(meta),)}, ValueError, r"on one device: got history on meta"),
    (
        q_sample,
        {"gamma": torch.full((2,), 0.5, device=meta)},
        ValueError,
        r"gamma must be on the host or on cpu",
    ),
    (norm, {"weight": torch.ones(4, device=meta)}, ValueError, r"on one device: got weight on meta"),
    (add_norm, {"residual": y(2, 4, 5, 7).to(meta)}, ValueError, r"on one device: got residual on meta"),
    # ranges
    (refine, {"gamma_t": 0.0}, ValueError, r"gamma_t must be in \(0, 1\): got 0.0"),
    (refine, {"gamma_t": 1.0}, ValueError, r"gamma_t must be in \(0, 1\): got 1.0"),
    (refine, {"gamma_t": math.nan}, ValueError, r"gamma_t must be in \(0, 1\): got nan"),
    (refine, {"gamma_t": torch.tensor(1.5)}, ValueError, r"gamma_t must be in \(0, 1\): got 1.5"),
    (refine, {"alpha_t": 0.4}, ValueError, r"alpha_t must be in \[gamma_t, 1\] = \[0.5, 1\]: got 0.4"),
    (refine, {"alpha_t": 1.1}, ValueError, r"alpha_t must be in .*: got 1.1"),
    (refine, {"alpha_t": torch.tensor(1.5)}, ValueError, r"alpha_t must be in .*: got 1.5"),
    (
        refine,
        {"alpha_t": torch.tensor([0.9, 0.9])},
        ValueError,
        r"alpha_t must be one number: got a tensor \(2,\)",
    ),
    (refine, {"step": 0}, ValueError, r"step must be in 1 \.\. 2\^32 - 1: got 0"),
    (refine, {"step": torch.tensor(0)}, ValueError, r"step must be in 1 \.\. 2\^32 - 1: got 0"),
    (refine, {"step": 2**32}, ValueError, r"step must be in 1 .* got 4294967296"),
    (refine, {"origin": (-1, 0)}, ValueError, r"origin must be in .*: got \(-1, 0\)"),
    (refine, {"origin": (0, 2**32)}, ValueError, r"origin must be in .*: got \(0, 4294967296\)"),
    (refine, {"origin": (2**32 - 4, 0)}, ValueError, r"as must every pixel: got \(4294967292, 0\) for 5 x 7"),
    (noise, {"origin": (0, 2**32 - 6)}, ValueError, r"as must every pixel: .* for 5 x 7"),
    (solver_step, {"step": 0}, ValueError, r"step must be in 1"),
    (solver_step, {"row": (*ROW[:8], math.nan)}, ValueError, r"a row holds numbers: got nan"),
    (solver_step, {"row": torch.tensor([*ROW[:8], math.nan])}, ValueError, r"a row holds numbers: got nan"),
    (solver_step, {"row": (*ROW[:2], -1.0, *ROW[3:])}, ValueError, r"clip, .*, must not be negative: got -1"),
    (q_sample, {"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\]: got 0.0"),
    (q_sample, {"gamma": 1.5}, ValueError, r"gamma must be in \(0, 1\]: got 1.5"),
    (q_sample, {"gamma": torch.tensor([0.5, 1.5])}, ValueError, r"got values from 0.5 to 1.5"),
    (q_sample, {"gamma": torch.tensor([0.5, math.nan])}, ValueError, r"gamma must be in \(0, 1\]"),
    (q_sample, {"step": -1}, ValueError, r"step must be in 0 .* got -1"),
    (noise, {"domain": 65536}, ValueError, r"domain must be in 0 .. 65535: got 65536"),
    (noise, {"step": -1}, ValueError, r"step must be in 0 .* got -1"),
    (norm, {"groups": 3}, ValueError, r"groups must divide the channels: got 4 channels and groups=3"),
    (norm, {"groups": 0}, ValueError, r"groups must divide the channels: got 4 channels and groups=0"),
    (norm, {"eps": -1e-5}, ValueError, r"eps must not be negative: got -1e-05"),
    (norm, {"eps": math.nan}, ValueError, r"eps must not be negative: got nan"),
    (add_norm, {"groups": 3}, ValueError, r"groups must divide the channels"),
    # seeds
    (refine, {"seed": [1, 2, 3]}, ValueError, r"one seed a sample: got \(3,\) seeds for a batch of 2"),
    (
        q_sample,
        {"seed": torch.tensor([1])},
        ValueError,
        r"one seed a sample: got \(1,\) seeds for a batch of 2",
    ),
    (noise, {"seed": [1]}, ValueError, r"one seed a sample"),
    (refine, {"seed": None}, ValueError, r"needs a seed or z: got neither"),
    (q_sample, {"seed": None}, ValueError, r"needs a seed or eps: got neither"),
    # history
    (solver_step, {"history": ()}, ValueError, r"the row has C1=-0.15 but history holds 0 tensors"),
    (solver_step, {"history": (y(),)}, ValueError, r"the row has C2=0.05 but history holds 1 tensors"),
    (solver_step, {"history": (), "row": torch.tensor(ROW)}, ValueError, r"the row has C1=-0.15"),
    # out= and into=
    (refine, {"out": y(layout=torch.channels_last)}, ValueError, r"out must have the input's layout"),
    (refine, {"y_t": grad(y()), "out": y()}, ValueError, r"an input requires grad"),
    (refine, {"eps_hat": grad(y()), "into": y()}, ValueError, r"an input requires grad"),
    (refine, {"out": grad(y())}, ValueError, r"out must not require grad"),
    (refine, {"into": grad(y())}, ValueError, r"into must not require grad"),
    (refine, {"alpha_t": grad(torch.tensor(0.9))}, ValueError, r"alpha_t must not require grad: there is no deriv"),
    (refine, {"gamma_t": grad(torch.tensor(0.5))}, ValueError, r"gamma_t must not require grad"),
    (q_sample, {"gamma": grad(torch.tensor(0.5))}, ValueError, r"gamma must not require grad"),
    (solver_step, {"row": grad(torch.tensor(ROW))}, ValueError, r"row must not require grad"),
    (refine, {"into": y(1, 3, 5, 7).expand(2, 3, 5, 7)}, ValueError, r"into must not overlap itself in memory"),
    (
        *(refine, {"into": flat[:400].as_strided((2, 3, 5, 7), (105, 35, 1, 1))}),
        *(ValueError, r"into must not overlap itself in memory: got strides \(105, 35, 1, 1\)"),
    ),
    (
        refine,
        {"eps_hat": buffer[:, :3], "out": buffer.view(-1)[70:280].view(2, 3, 5, 7)},
        ValueError,
        r"must not overlap eps_hat",
    ),
    (
        refine,
        {"y_t": flat[:210].view(2, 3, 5, 7), "out": flat[7:217].view(2, 3, 5, 7)},
        ValueError,
        r"must not overlap",
    ),
    (
        refine,
        {"z": flat[:210].view(2, 3, 5, 7), "out": flat[:210].view(2, 3, 5, 7)},
        ValueError,
        r"must not overlap z",
    ),
    (
        refine,
        {"eps_hat": flat[:210].view(2, 3, 5, 7), "into": flat[:210].view(2, 3, 5, 7)},
        ValueError,
        r"into must not overlap",
    ),
    (
        *(refine, {"out": flat[:210].view(2, 3, 5, 7), "into": flat[209:419].view(2, 3, 5, 7)}),
        *(ValueError, r"into must not overlap out"),
    ),
    (
        *(solver_step, {"out": (flat[:210].view(2, 3, 5, 7), flat[5:215].view(2, 3, 5, 7))}),
        *(ValueError, r"m must not overlap out"),
    ),
    (q_sample, {"y_0": grad(y()), "out": y()}, ValueError, r"an input requires grad"),
    (q_sample, {"eps": y(), "out": (y(), y())}, ValueError, r"a place for eps, but eps was given"),
    (
        *(q_sample, {"out": (flat[:210].view(2, 3, 5, 7), flat[5:215].view(2, 3, 5, 7))}),
        *(ValueError, r"eps must not overlap out"),
    ),
]


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    BAD,
    ids=[f"{b[0].__name__}-{'-'.join(b[1])}-{i}" for i, b in enumerate(BAD)],
)
def test_bad_input(op, changed, error, message):
    before = flat.clone()
    with pytest.raises(error, match=message):
        op(**changed)
    assert torch.equal(flat, before)


@pytest.mark.skipif(isinstance(backend.load("cpp"), str), reason="the C++ home is not built")
def test_one_look_at_a_step_takes_nothing_that_needs_another():
    def memory(first):
        return flat[first : first + 210].view(2, 3, 5, 7)

    good = memory(210)
    assert is_plain_step(y(), y(), y()) and is_plain_step(good, good, y())
    assert is_plain_step(good, memory(0), y()) and is_plain_step(y(), good, good)
    odd = {
        "near": (memory(0), memory(209)),
        "shape": y(2, 3, 7, 5),
        "three dimensions": torch.randn(6, 5, 7),
        "batch": y(1, 3, 5, 7).expand(2, 3, 5, 7),
        "channels_last": y(layout=torch.channels_last),
        "strides": y(2, 3, 7, 5).transpose(2, 3),
        "empty": y(0, 3, 5, 7),
        "float16": y().half(),
        "float64": y().double(),
        "grad": grad(y()),
        "parameter": torch.nn.Parameter(y(), requires_grad=False),
        "negative": torch.randn(2, 3, 5, 7, dtype=torch.complex64).conj().imag.contiguous()._neg_view(),
        "meta": y().to("meta"),
        "number": 1.0,
        "none": None,
    }
    for name, t in odd.items():
        near, t = t if isinstance(t, tuple) else (y(), t)
        for out, y_t, eps_hat in ((t, near, y()), (near, t, y()), (near, y(), t)):
            assert not is_plain_step(out, y_t, eps_hat), name
    assert not is_plain_step(good, y(), good) and not is_plain_step(good, good, good), "out may be y, not eps_hat"


def test_the_inputs_those_start_from_are_good():
    assert all(op() is not None for op in (refine, solver_step, q_sample, noise, norm, add_norm))


def test_two_channel_ranges_of_one_buffer_do_not_overlap():
    for layout in (torch.contiguous_format, torch.channels_last):
        network_input = torch.zeros(2, 6, 5, 7).to(memory_format=layout)
        network_input[:, :3] = y()
        out = refine(eps_hat=network_input[:, :3], into=network_input[:, 3:])
        assert same_bits(network_input[:, 3:], out) and same_bits(network_input[:, :3], y())


def test_under_no_grad_leaves_may_be_written_from():
    with torch.no_grad():
        expected = refine(y_t=y())
        assert same_bits(refine(y_t=grad(y()), out=nan_like(y())), expected)


def test_a_row_may_be_a_column_of_a_table(home):
    table = torch.tensor(ROW, device=home)[:, None].repeat(1, 5)
    given = [t.to(home) for t in (y(), y(seed=1), y(seed=2), y(seed=3))]
    for row in (table[:, 2], torch._neg_view(-table[:, 2])):
        got = ops.solver_step(*given[:2], row, 3, 4, history=given[2:])
        assert all(map(same_bits, got, ops.solver_step(*given[:2], ROW, 3, 4, history=given[2:])))
    with pytest.raises(ValueError, match=r"C1=-0.15 but history holds 0"):
        ops.solver_step(*given[:2], torch.tensor(ROW)[:, None].repeat(1, 5)[:, 2], 3, 4)


@pytest.mark.parametrize("inference", (False, True))
def test_lazily_negated_tensors_are_read_as_they_are(home, inference):
    """torch keeps some negations, as of an imaginary part's conjugate, as a bit of the tensor."""

    def negated(seed):
        return torch._neg_view(-y(seed=seed).to(home))

    out = {"out": nan_like(y()).to(home)} if inference else {}
    pairs = {"out": (nan_like(y()).to(home), nan_like(y()).to(home))} if inference else {}
    with torch.no_grad():
        for z in (None, 2):
            got = ops.refine(negated(0), negated(1), 0.9, 0.5, 3, 4, z=z and negated(z), **out)
            plain = ops.refine(*(y(seed=s).to(home) for s in (0, 1)), 0.9, 0.5, 3, 4, z=z and y(seed=z).to(home))
            assert same_bits(got, plain)
        if inference:
            target = torch._neg_view(nan_like(y()).to(home))
            for written in ({"out": target}, {"into": target}):
                with pytest.raises(ValueError, match="must not be views that negate"):
                    ops.refine(y().to(home), y(seed=1).to(home), 0.9, 0.5, 3, 4, **written)
        got, plain = ops.q_sample(negated(0), 0.3, 5, 2, **pairs), ops.q_sample(y().to(home), 0.3, 5, 2)
        assert all(map(same_bits, got, plain))


def test_autograd_sees_what_out_and_into_overwrite():
    def written(**outs):
        a = grad(y(seed=5))
        h = a * 2
        loss = h.square().sum()  # saves h
        with torch.no_grad():
            for op, name in ((refine, "out"), (refine, "into"), (q_sample, "into")):
                if outs.get(op.__name__) == name:
                    op(**{name: h.detach()})
            if outs.get("solver_step"):
                solver_step(out=(y(), h.detach()))
        loss.backward()

    written()
    for outs in ({"refine": "out"}, {"refine": "into"}, {"q_sample": "into"}, {"solver_step": "m"}):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            written(**outs)
    with torch.inference_mode():
        refine(out=y(), into=y())


def test_autograd_sees_that_alpha_and_gamma_were_overwritten():
    """They may be static tensors, which the next step fills anew."""
    for changed in ("alpha", "gamma"):
        alpha, gamma = torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.5, 0.6], dtype=torch.float64)
        image = grad(y())
        outs = (ops.q_sample(image, gamma, 0)[0], ops.refine(image, y(seed=1), alpha, gamma[0], 0, 3))
        {"alpha": alpha, "gamma": gamma}[changed].mul_(0.5)
        for out in outs[changed == "alpha" :]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


def test_a_stride_of_a_dimension_of_size_1_says_nothing():
    def an_array_turned():
        return torch.zeros(3, 5, 7, 1).permute(3, 0, 1, 2)  # strides (1, 35, 7, 1), and contiguous

    image, eps_hat, into = an_array_turned().copy_(y(1, 3, 5, 7)), y(1, 3, 5, 7, seed=1), torch.zeros(1, 3, 5, 7)
    for op in (
        lambda **out: ops.refine(image, eps_hat, 0.9, 0.5, 0, 3, **out),
        lambda **out: ops.solver_step(image, eps_hat, (1.2, 0.7, 1.0, 0.9, -0.1, 0.3, 0.0, 0.0, 0.5), 0, 3, **out)[0],
        lambda **out: ops.q_sample(image, 0.5, 0, **out)[0],
    ):
        expected = op()
        assert same_bits(op(out=image, into=into), expected) and same_bits(into, expected)


def test_a_sum_that_was_kept_has_its_shift_in_it():
    h, ones, mean = y(), torch.ones(3), torch.zeros(2, 1)
    arguments = (h, h, None, ones, ones, mean, mean, 1, torch.zeros(2, 3), True, h)
    with pytest.raises(ValueError, match="grad_s is the gradient of a sum, which has its shift in it"):
        torch.ops.sr3fast.group_norm_silu_backward(*arguments)


def test_a_forced_home_runs_the_backward_pass_too():
    """Autograd calls from threads of its own, where nothing is forced."""
    called = []
    find = backend._find

    def noted(op, device, forced):
        called.append((op, forced))
        return find(op, device, forced)

    h = grad(y(2, 4, 5, 7))
    with pytest.MonkeyPatch.context() as patch, backend.use("torch"):
        patch.setattr(backend, "_find", noted)
        for out in (norm(h=h), add_norm(h=h)[0]):
            thread = threading.Thread(target=lambda out=out: out.sum().backward())
            thread.start()
            thread.join()
    backward = [forced for op, forced in called if op == "group_norm_silu_backward"]
    assert backward == ["torch", "torch"] and h.grad is not None


def test_a_second_derivative_is_refused():
    for op in (norm, lambda h: add_norm(h=h)[0]):
        h = grad(y(2, 4, 5, 7))
        (first,) = torch.autograd.grad(op(h=h).square().sum(), h, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()


def test_shapes_alone_are_enough_for_tensors_without_memory():
    from torch._subclasses import FakeTensorMode

    for mode, device in ((contextlib.nullcontext(), "meta"), (FakeTensorMode(), "cpu")):
        with mode:
            y_t, eps_hat, out, into = (torch.empty(2, 3, 5, 7, device=device) for _ in range(4))
            assert ops.refine(y_t, eps_hat, 0.9, 0.5, 3, 4, out=out, into=into) is out
            assert ops.q_sample(y_t, 0.5, 3, out=(out, into))[1] is into


def test_numpys_integers_are_integers():
    for ours, numpys in ((3, np.int64(3)), ([3, 9], list(np.array([3, 9])))):
        assert same_bits(noise(seed=ours, step=2), noise(seed=numpys, step=np.int32(2)))
        assert same_bits(refine(seed=ours), refine(seed=numpys, out=nan_like(y())))


def test_every_op_documents_itself():
    for op in (
        ops.noise,
        ops.refine,
        ops.solver_step,
        ops.q_sample,
        ops.group_norm_silu,
        ops.add_group_norm_silu,
    ):
        text = inspect.getdoc(op)
        assert all(part in text for part in ("Equivalent to", "Args:", "Raises:")), op.__name__


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)], ids=str)
def test_empty_tensors(home, shape):
    t = torch.zeros(shape, device=home)
    leaf = t.clone().requires_grad_()
    assert ops.refine(t, t, 0.9, 0.5, 3, 4).shape == shape
    assert [o.shape for o in ops.solver_step(t, t, ROW, 3, 4, history=(t, t))] == [shape, shape]
    assert [o.shape for o in ops.q_sample(t, 0.5, 3)] == [shape, shape]
    out = torch.empty_like(t)
    assert ops.refine(t, t, 0.9, 0.5, 3, 4, out=out, into=torch.empty_like(t)) is out
    (grad_y,) = torch.autograd.grad(ops.refine(leaf, t, 0.9, 0.5, 3, 4).sum(), leaf)
    assert grad_y.shape == shape


# ---------------------------------------------------------------------------------------------- torch.library

SEED, STEP, HALF = torch.tensor(3), torch.tensor(4), torch.tensor(0.5, dtype=torch.float64)
NORM = (torch.tensor([1.0, 0.5, 2.0, 1.5]), torch.tensor([0.1, 0.0, -0.2, 0.3]), 2, 1e-5)


def norm_args(*tensors, shift=None):
    return (*tensors, *NORM, shift, True)


def backward_args(pair):
    h, h2 = (y(2, 3, 5, 7), y(2, 1, 5, 7)) if pair else (y(2, 4, 5, 7), None)
    mean, rstd = torch.zeros(2, 2), torch.ones(2, 2)
    return (y(2, 4, 5, 7), h, h2, *NORM[:2], mean, rstd, 2, y(2, 4), True, None)


OP_CASES = {
    "noise": [(SEED, STEP, [2, 3, 5, 7], 1, 0, 0, torch.float32, torch.device("cpu"))],
    "refine": [
        (grad(y()), grad(y(seed=1)), 0.9 + 0 * HALF, HALF, SEED, STEP, z, 0, 0) for z in (None, grad(y(seed=2)))
    ],
    "refine_out": [(y(), y(seed=1), HALF, HALF, SEED, STEP, None, 0, 0, y(seed=3), into) for into in (None, y(seed=4))],
    "solver_step": [
        (
            grad(y()),
            grad(y(seed=1)),
            torch.tensor(ROW),
            SEED,
            STEP,
            grad(y(seed=2)),
            grad(y(seed=3)),
            None,
            0,
            0,
        )
    ],
    "solver_step_out": [
        (
            y(),
            y(seed=1),
            torch.tensor(ROW),
            SEED,
            STEP,
            y(seed=2),
            y(seed=3),
            None,
            0,
            0,
            y(seed=4),
            m,
            y(seed=6),
        )
        for m in (None, y(seed=5))
    ],
    "q_sample": [(grad(y()), HALF, SEED, STEP, eps, 0, 0) for eps in (None, grad(y(seed=2)))],
    "q_sample_out": [(y(), HALF, SEED, STEP, None, 0, 0, y(seed=1), y(seed=2), None)],
    "group_norm_silu": [
        norm_args(grad(y(2, 4, 5, 7)), None),
        norm_args(grad(y(2, 3, 5, 7)), grad(y(2, 1, 5, 7)), shift=grad(y(2, 4))),
        norm_args(y(2, 4, 5, 7, layout=torch.channels_last, dtype=torch.bfloat16), None),
    ],
    "add_group_norm_silu": [norm_args(grad(y(2, 4, 5, 7)), grad(y(2, 4, 5, 7, seed=1)), shift=grad(y(2, 4)))],
    "group_norm_silu_backward": [backward_args(False), backward_args(True)],
}


@pytest.mark.parametrize(("name", "args"), [(name, args) for name, cases in OP_CASES.items() for args in cases])
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.sr3fast, name), args)


def test_opcheck_has_every_op():
    defined = {op.split("::")[1].split(".")[0] for op in torch._C._dispatch_get_all_op_names() if "sr3fast::" in op}
    assert defined == set(OP_CASES)


# ---------------------------------------------------------------------------------------------- torch.compile

compiler = shutil.which("c++") or shutil.which("g++")
BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not compiler, reason="no C++ compiler")),
]


@pytest.fixture(params=BACKENDS)
def compiled(request):
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend=request.param)
    torch._dynamo.reset()


def test_compiled_loop_with_changing_numbers(compiled):
    """A sampling loop in one's own code: alpha, gamma and the step are Python numbers that change."""
    schedule = Schedule.named("linear", T=2000)

    def step(y_t, eps_hat, alpha, gamma, seed, t):
        return ops.refine(y_t * 1.0, eps_hat, alpha, gamma, seed, t) + 0

    fast = compiled(step)
    y_t, eps_hat = y(), y(seed=1)
    for seed in (3, 4, 2**62):
        for t in (*range(2000, 0, -150), 1):
            args = (y_t, eps_hat, schedule.alpha[t].item(), schedule.gamma[t].item(), seed, t)
            assert same_bits(fast(*args), step(*args))


def test_compiled_noise_and_kinds_of_seeds(compiled):
    def draw(y_t, seed):
        return ops.noise(y_t.shape, seed, step=4) + ops.refine(y_t, y_t, 0.9, 0.5, seed, 4)

    fast = compiled(draw)
    for seed in (3, [5, -7], torch.tensor([5, -7]), torch.tensor(9)):
        assert same_bits(fast(y(), seed), draw(y(), seed))


def test_compiled_solver_with_changing_rows(compiled):
    table = rows(Schedule.named("linear", T=2000), solver="dpm++2m", steps=12).rows

    def step(y, eps_hat, row, history, t):
        return ops.solver_step(y, eps_hat, row, 3, t, history=history)

    fast = compiled(step)
    image, eps_hat, history = y(), y(seed=1), (y(seed=2), y(seed=3))
    for i, row in enumerate(table):
        for row_of_step in (row, tuple(row.tolist())):
            args = (image, eps_hat, row_of_step, history, len(table) - i)
            assert all(map(same_bits, fast(*args), step(*args)))


def test_compiled_training_step(compiled):
    """q_sample and the norms, forward and backward, with shapes and gamma that change."""

    def loss(y_0, gamma, t, weight, bias, shift):
        y_t, eps = ops.q_sample(y_0, gamma, 3, t)
        h = ops.group_norm_silu(y_t, weight, bias, 2, shift=shift)
        pair = ops.group_norm_silu((h, y_0), weight.repeat(2), bias.repeat(2), 4)
        out, s = ops.add_group_norm_silu(h, y_0, weight, bias, 2)
        return (out * s - eps).square().mean() + pair.sum()

    fast = compiled(loss)
    for i, size in enumerate(((5, 7), (6, 9), (5, 7))):
        for gamma in (0.3 + 0.1 * i,):
            tensors = [grad(t) for t in (y(2, 4, *size), *(p.clone() for p in NORM[:2]), y(2, 4, seed=5))]
            y_0, *parameters = tensors
            value, expected = (f(y_0, gamma, i, *parameters) for f in (fast, loss))
            assert torch.allclose(value, expected, rtol=1e-5)
            for a, b in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(expected, tensors), strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_out_and_into(compiled):
    def step(y_t, eps_hat, network_input, alpha, t):
        with torch.no_grad():
            ops.refine(y_t, eps_hat, alpha, 0.3, 3, t, out=y_t, into=network_input[:, 3:])
        return y_t

    fast = compiled(step)
    for t, alpha in ((4, 0.9), (3, 0.95), (2, 0.99)):
        states = []
        for f in (fast, step):
            y_t, network_input = y(), torch.zeros(2, 6, 5, 7, dtype=torch.bfloat16)
            f(y_t, y(seed=1), network_input, alpha, t)
            states.append((y_t, network_input))
        assert all(map(same_bits, *states)) and states[0][1][:, 3:].count_nonzero() > 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *((refine, name) for name in ("y_t", "eps_hat", "alpha_t", "gamma_t", "z")),
        *((solver_step, name) for name in ("y", "eps_hat", "row", "history", "z")),
        *((q_sample, name) for name in ("y_0", "gamma", "eps")),
        *((norm, name) for name in ("h", "weight", "bias", "shift")),
        *((add_norm, name) for name in ("h", "residual", "weight")),
    ],
)
def test_a_tangent_is_refused_not_lost(call, name):
    C = 4 if call in (norm, add_norm) else 3
    values = {
        **{"alpha_t": torch.tensor(0.9), "gamma_t": torch.tensor(0.5), "gamma": torch.tensor(0.5)},
        **{"row": torch.tensor(ROW), "weight": torch.ones(C), "bias": torch.zeros(C), "shift": torch.zeros(2, C)},
    }
    value = values.get(name, y(2, C, 5, 7))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(ValueError, match=rf"{name} must not have a tangent: the ops differentiate in reverse mode"):
            call(**{name: (dual, y()) if name == "history" else dual})
        assert call(**{name: (value, y()) if name == "history" else value}) is not None


def test_a_tangent_of_the_common_call_is_refused():
    y_t, eps_hat = y(), y(seed=1)
    with pytest.raises(ValueError, match="y_t must not have a tangent"):
        torch.func.jvp(lambda t: refine(y_t=t, eps_hat=eps_hat, out=torch.empty(2, 3, 5, 7)), (y_t,), (y_t,))


def test_a_channel_of_an_expanded_tensor_is_a_tensor_like_any():
    y = torch.randn(1, 1, 16, 16).expand(1, 3, 16, 16)[:, :1]  # one channel, of stride 0
    eps_hat = torch.randn(1, 1, 16, 16)
    expected = ops.refine(y, eps_hat, 0.9, 0.5, 0, 2)
    assert torch.equal(ops.refine(y, eps_hat, 0.9, 0.5, 0, 2, out=y), expected)
    ops.solver_step(y, eps_hat, [0, 1, math.inf, 1, 0, 0, 0, 0, 0.5], 0, 2, z=eps_hat, out=y)
