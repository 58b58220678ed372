"""The CUDA and Triton homes on a GPU: what only a GPU shows. All tests of the ops run there too (conftest.py)."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, assert_as_exact_as_torch, nan_like, random, same_bits

from sr3fast import backend, ops

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ROW = (1.2, 0.7, 1.0, 0.9, -0.1, 0.3, 0.2, -0.4, 0.5)


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def gpu_home(request):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if isinstance(backend.load(request.param), str):
        pytest.skip(f"the {request.param} home is not there: {backend.load(request.param)}")
    with backend.use(request.param):
        yield


def on_cpu(f):
    """f's tensors as the C++ home, or plain torch where there is none, makes them on the CPU."""
    with backend.use("torch" if isinstance(backend.load("cpp"), str) else "cpp"):
        return f(torch.device("cpu"))


def assert_same_bits_as_on_cpu(f):
    for i, (a, b) in enumerate(zip(f(DEVICE), on_cpu(f), strict=True)):
        assert same_bits(a, b), i


# ------------------------------------------------------------------------------------------- noise and steps


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 512, 512), (1, 3, 333, 511), (2, 13, 130, 70), (8, 4, 128, 128)], ids=str)
def test_steps_have_the_cpus_bits(shape, layout):
    for dtype in DTYPES:

        def run(device, dtype=dtype):
            y, m1, m2 = (random(*shape, seed=s, device=device, layout=layout) for s in (1, 2, 3))
            f = random(*shape, seed=4, dtype=dtype, device=device, layout=layout)
            out, m = nan_like(y), nan_like(y)
            ops.solver_step(y, f, ROW, 5, 12, history=(m1, m2), out=(out, m))
            x = f.float()
            return (
                *(out, m, ops.refine(y, f, 0.9, 0.5, 123, 4, origin=(2, 8))),
                *(ops.noise(shape, 7, step=3, dtype=dtype, device=device), *ops.q_sample(f, 0.3, 77, 5)),
                *ops.q_sample(x, torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64, device=device), 77, 5),
            )

        assert_same_bits_as_on_cpu(run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_between_a_networks_buffers(layout):
    """eps_hat and into= are some channels of channels_last buffers; y and m are written in place."""
    shape = (3, 3, 65, 62)

    def run(device):
        y, m1, m = (random(*shape, seed=s, device=device, layout=layout) for s in (1, 2, 3))
        output = random(3, 8, 65, 62, seed=4, dtype=torch.bfloat16, device=device, layout=torch.channels_last)
        into = nan_like(output)
        ops.solver_step(y, output[:, 1:4], ROW, 5, 12, history=(m1, m), out=(y, m), into=into[:, 3:6])
        return y, m, into

    assert_same_bits_as_on_cpu(run)


def test_scalars_in_device_memory():
    shape = (4, 3, 64, 64)

    def run(device):
        y, f = random(*shape, seed=1, device=device), random(*shape, seed=2, dtype=torch.float16, device=device)
        number = lambda value, dtype=torch.float64: torch.tensor(value, dtype=dtype, device=device)  # noqa: E731
        step, seeds = number(7, torch.int64), number([3, -1, 1 << 62, 9], torch.int64)
        row = number(ROW, torch.float32)
        return (
            ops.refine(y, f, number(0.97), number(0.4), seeds, step),
            ops.solver_step(y, f, row, number(5, torch.int64), step, history=(y, y))[0],
            *ops.q_sample(y, number(0.3), seeds, step),
        )

    assert_same_bits_as_on_cpu(run)


def test_a_captured_graph_replays_with_new_scalars():
    shape = (2, 3, 128, 128)
    y, f = random(*shape, seed=1, device=DEVICE), random(*shape, seed=2, device=DEVICE)
    row = torch.tensor(ROW, device=DEVICE)
    step = torch.tensor(9, device=DEVICE)
    seeds = torch.tensor([1, 2], device=DEVICE)
    alpha, gamma = (torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (0.9, 0.5))
    h = random(2, 64, 32, 32, seed=3, device=DEVICE, dtype=torch.bfloat16, layout=torch.channels_last)
    weight, bias = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)

    def run():
        return (
            ops.solver_step(y, f, row, seeds, step, history=(y, f))[0],
            ops.refine(y, f, alpha, gamma, seeds, step),
            ops.group_norm_silu(h, weight, bias, 32),
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
    torch.cuda.synchronize()
    for t, (a, g) in ((8, (0.8, 0.4)), (1, (0.99, 0.7))):
        step.fill_(t)
        seeds += 100
        row[8] += 0.25
        alpha.fill_(a), gamma.fill_(g)
        h += 1
        graph.replay()
        with torch.no_grad():
            for a, b in zip(captured, run(), strict=True):
                assert same_bits(a, b)


def test_more_than_2_31_elements():
    """Offsets of 64 bits: the far corner of an image is what a tile at that corner gets."""
    shape = (1, 2, 32768, 32896)
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB of device memory")
    z = ops.noise(shape, 5, step=3, device=DEVICE)
    assert z.numel() > 1 << 31
    far = (32768 - 64, 32896 - 128)
    corner = ops.noise((1, 2, 64, 128), 5, step=3, origin=far, device=DEVICE)
    assert same_bits(z[:, :, far[0] :, far[1] :], corner)
    y = torch.zeros(shape, device=DEVICE)
    eps_hat = torch.zeros(1, 1, 1, 1, device=DEVICE).expand(shape)  # strides of 0: no further memory
    ops.refine(y, eps_hat, 0.9, 0.5, 5, 3, out=y)
    expected = ops.refine(torch.zeros_like(corner), torch.zeros_like(corner), 0.9, 0.5, 5, 3, origin=far)
    assert same_bits(y[:, :, far[0] :, far[1] :], expected)


# --------------------------------------------------------------------------------------------------- norms

# a cluster's slice, one block's, several slices; a slice that no cluster holds; samples in several chunks of L2
NORMS = [
    ((1, 64, 128, 128), 32),
    ((2, 192, 128, 128), 32),
    ((3, 1024, 8, 8), 32),
    ((2, 8, 257, 255), 1),
    ((1, 32, 512, 512), 4),
    ((24, 64, 256, 128), 32),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), NORMS, ids=str)
def test_norms_of_every_size(shape, groups, layout, dtype):
    b, c = shape[:2]
    x = random(*shape, seed=1, mean=0.5, dtype=dtype, device=DEVICE, layout=layout).requires_grad_()
    weight = random(c, seed=2, mean=1.0, std=0.3, dtype=dtype, device=DEVICE).requires_grad_()
    bias = random(c, seed=3, dtype=dtype, device=DEVICE).requires_grad_()
    shift = random(b, c, seed=4, dtype=dtype, device=DEVICE).requires_grad_()
    grad = random(*shape, seed=5, dtype=dtype, device=DEVICE, layout=layout)

    def plain(*t):
        return F.silu(F.group_norm(t[0] + t[3][:, :, None, None], groups, t[1], t[2]))

    def forward_and_backward(f, *leaves):
        out = f(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    def fused(*t):
        return ops.group_norm_silu(t[0], t[1], t[2], groups, shift=t[3])

    leaves = (x, weight, bias, shift)
    actual = forward_and_backward(fused, *leaves)
    expected = forward_and_backward(plain, *leaves)
    exact = forward_and_backward(plain, *(t.detach().double().requires_grad_() for t in leaves))
    again = forward_and_backward(fused, *leaves)
    for name, a, p, e, second in zip(
        ("out", "dh", "dweight", "dbias", "dshift"), actual, expected, exact, again, strict=True
    ):
        assert_as_exact_as_torch(a, p, e, name)
        assert same_bits(a, second), f"{name} is not deterministic"


def test_norms_on_two_streams_do_not_share_memory():
    """Each has its own scratch: two norms at once give what each gives alone."""
    inputs = [random(2, 8, 257, 255, seed=s, mean=s, device=DEVICE) for s in (1, 2)]
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    alone = [ops.group_norm_silu(x, weight, bias, 1) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = [[], []]
    for _ in range(20):
        for x, stream, result in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(ops.group_norm_silu(x, weight, bias, 1))
    torch.cuda.synchronize()
    for expected, result in zip(alone, results, strict=True):
        assert all(same_bits(r, expected) for r in result)
