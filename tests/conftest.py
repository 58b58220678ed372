"""What the tests of the ops share: the homes at hand, the tolerance, data that tells elements apart."""

import math
import os

import pytest
import torch

from sr3fast import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def homes():
    """Every (home, device) that runs here."""
    found = [("torch", "cpu"), ("cpp", "cpu")]
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append(("triton", "cpu"))
    if torch.cuda.is_available():
        found += [(home, "cuda") for home in backend.HOMES["cuda"]]
    return [(home, device) for home, device in found if not isinstance(backend.load(home), str)]


def pytest_generate_tests(metafunc):
    if "home" in metafunc.fixturenames:
        marks = {"cuda": (pytest.mark.gpu,), "cpu": ()}
        params = [pytest.param(h, marks=marks[h[1]], id=f"{h[0]}-{h[1]}") for h in homes()]
        metafunc.parametrize("home", params, indirect=True)


@pytest.fixture
def home(request):
    """Force one home for the test; gives its device."""
    name, device = request.param
    with backend.use(name):
        yield torch.device(device)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape, seed=0, mean=0.0, std=1.0, dtype=torch.float32, device="cpu", layout=torch.contiguous_format):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std + mean
    t = t.to(device, dtype)
    return t.to(memory_format=layout) if t.ndim == 4 else t


def nan_like(t):
    return torch.full_like(t, math.nan)


def bits(t):
    return t.cpu().contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def ulp(value, dtype):
    """The spacing of `dtype` at `value`."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 1) if value else 0.0


def assert_as_exact_as_torch(actual, plain, exact, name="result"):
    """Error against float64: at most twice plain torch's in that dtype, plus an ulp of the largest value."""
    assert actual.shape == exact.shape and actual.dtype == plain.dtype, name
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    exact = exact.detach()
    error, allowed = ((t.detach().double() - exact).abs().max().item() for t in (actual, plain))
    limit = 2 * allowed + ulp(exact.abs().max().item(), plain.dtype)
    assert error <= limit, f"{name}: error {error:.3g}, plain torch's {allowed:.3g}, limit {limit:.3g}"
