"""UNet against a plain statement of Janspiry's networks, in the precision of that statement."""

import copy

import janspiry_reference as janspiry
import pytest
import torch
import torch.nn.functional as F

from sr3fast.compat.janspiry import CONFIGS
from sr3fast.compat.janspiry.names import renamed
from sr3fast.unet import ResnetBlock, UNet, sinusoid

SMALL = dict(channels=16, multipliers=(1, 2, 4), blocks=1, attention=(8,), groups=8, dropout=0.0, image_size=16)
VARIANTS = ("sr3", "ddpm")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(variant="sr3", inputs=6, outputs=3, dropout=0.0):
    """Our network and the plain one, with the same random weights."""
    plain = janspiry.diffusion(variant=variant, inputs=inputs, outputs=outputs, dropout=dropout).denoise_fn
    unet = UNet(**{**SMALL, "dropout": dropout}, in_channels=inputs, out_channels=outputs, variant=variant).eval()
    unet.load_state_dict(renamed(plain.state_dict()))
    return unet, plain


def inputs_of(unet, B=2, H=12, W=20):
    Cy = unet.out_channels
    x = torch.randn(B, unet.in_channels - Cy, H, W) if unet.in_channels > Cy else None
    level = torch.rand(B, 1) if unet.variant == "sr3" else torch.randint(2000, (B,))
    return x, torch.randn(B, Cy, H, W), level


def joined(x, y_t):
    return y_t if x is None else torch.cat([x, y_t], 1)


def exact(plain, x, y_t, level):
    """The plain network in float64, on the sinusoid in float32, as both compute it."""
    return doubled(plain, level)(joined(x, y_t).double(), level)


def doubled(plain, level):
    plain = fixed(copy.deepcopy(plain), level).double()
    plain.zero_grad()
    return plain


def fixed(plain, level):
    """The plain network with its own float32 sinusoid of this level."""
    embed = plain.noise_level_mlp if plain.variant == "sr3" else plain.time_mlp
    embed[0] = _Fixed(embed[0](level))
    return plain


class _Fixed(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, level):
        return self.value


def assert_as_good(ours, plain, truth):
    """Error against float64 at most twice plain torch's, plus one ulp of the largest value."""
    ulp = torch.finfo(plain.dtype).eps * truth.abs().max().item()
    error, theirs = ((v.double() - truth).abs().max().item() for v in (ours, plain))
    assert error <= 2 * theirs + ulp, (error, theirs, ulp)


@pytest.mark.parametrize("name", janspiry.CONFIGS)
def test_their_networks_tensor_by_tensor(name):
    with torch.device("meta"):
        unet = UNet(**CONFIGS[name])
        plain = janspiry.Network(**janspiry.CONFIGS[name])
    assert sum(p.numel() for p in unet.parameters()) == janspiry.PARAMETERS[name]
    assert len(plain.state_dict()) + len(janspiry.BUFFERS) == janspiry.TENSORS[name]
    frequencies = name.startswith("sr_ddpm")  # theirs saves them, ours computes them
    assert len(unet.state_dict()) == len(plain.state_dict()) - frequencies
    ours = {n: tuple(t.shape) for n, t in unet.state_dict().items()}
    theirs = {n: t for n, t in plain.state_dict().items() if not n.endswith("inv_freq")}
    assert {n: tuple(t.shape) for n, t in renamed(theirs).items()} == ours


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [(6, 3), (3, 3), (2, 1), (5, 1), (17, 13)])
def test_forward_is_theirs(variant, channels):
    unet, plain = pair(variant, *channels)
    torch.manual_seed(1)
    x, y_t, level = inputs_of(unet)
    with torch.no_grad():
        ours, theirs = unet(x, y_t, level), plain(joined(x, y_t), level)
        assert ours.shape == y_t.shape and ours.dtype == torch.float32
        assert_as_good(ours, theirs, exact(plain, x, y_t, level))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_is_theirs(variant):
    unet, plain = pair(variant)
    torch.manual_seed(2)
    x, y_t, level = inputs_of(unet)
    v = torch.randn_like(y_t)
    (unet(x, y_t, level) * v).sum().backward()
    (plain(joined(x, y_t), level) * v).sum().backward()
    truth = doubled(plain, level)
    (truth(joined(x, y_t).double(), level) * v).sum().backward()
    truth = renamed({n: p.grad for n, p in truth.named_parameters()})
    theirs = renamed({n: p.grad for n, p in plain.named_parameters()})
    for name, p in unet.named_parameters():
        assert p.grad is not None, name
        assert truth[name].abs().max() > 0, name
        # one tensor's largest error is a matter of luck: a factor 4 here, each against its own scale
        error, plain_error = ((g - truth[name]).abs().max() for g in (p.grad, theirs[name]))
        assert error <= 4 * plain_error + 4e-6 * truth[name].abs().max(), name


def test_channels_last_is_the_same_function():
    unet, plain = pair()
    x, y_t, level = inputs_of(unet)
    with torch.no_grad():
        theirs = plain(joined(x, y_t), level)
        last = unet.to(memory_format=torch.channels_last)
        ours = last(x.contiguous(memory_format=torch.channels_last), y_t, level)
        assert_as_good(ours, theirs, exact(plain, x, y_t, level))


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant, how):
    unet, plain = pair(variant)
    x, y_t, level = inputs_of(unet, H=32, W=32)
    x, y_t = x.bfloat16(), y_t.bfloat16()
    if how == "weights":
        unet = unet.bfloat16()
        for p in plain.parameters():
            p.data = p.data.bfloat16().float()
    truth = exact(plain, x, y_t, level)
    plain = fixed(plain, level)
    if how == "weights":
        plain = plain.bfloat16()
    else:
        x, y_t = x.float(), y_t.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ours, theirs = unet(x, y_t, level), plain(joined(x, y_t), level)
    assert ours.dtype == torch.bfloat16
    assert_as_good(ours, theirs, truth)


def test_the_level_keeps_its_precision_in_bfloat16():
    unet, _ = pair("ddpm")
    e = unet.bfloat16().embedding
    # 1000 and 1001 are one number in bfloat16
    assert not torch.equal(e(torch.tensor([1000])), e(torch.tensor([1001])))


def test_sinusoid():
    level = torch.tensor([[0.3], [0.99]])
    f = torch.tensor([1e4 ** (-i / 8) for i in range(8)], dtype=torch.float64)
    angle = level.double() * f
    assert torch.allclose(sinusoid(level, 16).double(), torch.cat([angle.sin(), angle.cos()], 1), atol=1e-7)
    assert torch.equal(sinusoid(torch.tensor([7]), 16), sinusoid(torch.tensor([[7.0]]), 16))


def test_dropout_is_before_the_second_convolution_in_training_only():
    unet, _ = pair(dropout=0.5)
    x, y_t, level = inputs_of(unet)
    with torch.no_grad():
        assert torch.equal(unet(x, y_t, level), unet(x, y_t, level))
        unet.train()
        assert not torch.equal(unet(x, y_t, level), unet(x, y_t, level))
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock)]
    dropouts = [m for m in unet.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts == [b.dropout for b in blocks] and all(d.p == 0.5 for d in dropouts)

    block, seen = blocks[0], {}
    block.conv1.register_forward_hook(lambda m, i, o: seen.update(conv1=o))
    block.dropout.register_forward_hook(lambda m, i, o: seen.update(into=i[0], out=o))
    block.conv2.register_forward_hook(lambda m, i, o: seen.update(conv2=i[0]))
    e = torch.randn(2, 16)
    h = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        block(h, e)
    s = seen["conv1"] + block.noise(e)[:, :, None, None]
    norm = block.norm2
    act = F.silu(F.group_norm(s, norm.num_groups, norm.weight, norm.bias, norm.eps))
    assert torch.allclose(seen["into"], act, atol=1e-5)
    assert seen["conv2"] is seen["out"]


def test_attention_where_image_size_says_whatever_the_input():
    def places(**options):
        with torch.device("meta"):
            unet = UNet(**options)
        return [n for n, m in unet.named_modules() if n.endswith("attention")]

    mid = ["mid.0.attention"]
    at_16 = [
        "downs.9.attention",
        "downs.10.attention",
        "ups.4.attention",
        "ups.5.attention",
        "ups.6.attention",
    ]
    assert places() == at_16[:2] + mid + at_16[2:]
    assert places(attention=()) == mid
    assert len(places(attention=(16, 64), image_size=256)) == 11
    unet, _ = pair()
    x, y_t, level = inputs_of(unet, H=40, W=8)
    assert unet(x, y_t, level).shape == (2, 3, 40, 8)


def test_config_rebuilds_it():
    options = {**SMALL, "in_channels": 4, "out_channels": 1, "variant": "ddpm"}
    with torch.device("meta"):
        unet = UNet(**options)
        again = UNet(**unet.config)
    assert unet.config == {**options} == again.config
    shapes = [{n: t.shape for n, t in u.state_dict().items()} for u in (unet, again)]
    assert shapes[0] == shapes[1]
    unet.config["channels"] = 3
    assert unet.config["channels"] == 16


def test_compiles_to_one_graph():
    unet, _ = pair()
    x, y_t, level = inputs_of(unet)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, y_t, level), unet(x, y_t, level))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups=3), "groups must divide the channels: got 16 channels and groups=3"),
        (dict(groups=0), "groups must be a positive integer: got 0"),
        (dict(channels=15, groups=5), "channels must be even .* got 15"),
        (dict(multipliers=()), "multipliers must be positive integers"),
        (dict(multipliers=(1, 0)), "multipliers must be positive integers"),
        (dict(in_channels=1, out_channels=3), "got 1 and 3"),
        (dict(image_size=18), "image_size must be a multiple of 2\\^\\(levels - 1\\) = 4: got 18"),
        (dict(dropout=1.0), "dropout must be in \\[0, 1\\): got 1.0"),
        (dict(variant="sr4"), "variant must be one of sr3, ddpm: got 'sr4'"),
    ],
)
def test_refuses_arguments(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **options})


def good(variant="sr3"):
    level = torch.rand(2, 1) if variant == "sr3" else torch.tensor([1, 2])
    return dict(x=torch.zeros(2, 3, 8, 8), y_t=torch.zeros(2, 3, 8, 8), level=level)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("sr3", dict(y_t=torch.zeros(2, 3, 8, 10)), "multiples of 2\\^\\(levels - 1\\) = 4: got H=8, W=10"),
        ("sr3", dict(y_t=torch.zeros(2, 1, 8, 8)), "y_t must be \\[B, 3, H, W\\].* got \\[2, 1, 8, 8\\]"),
        ("sr3", dict(y_t=torch.zeros(3, 8, 8)), "y_t must be"),
        ("sr3", dict(x=None), "x is missing"),
        ("sr3", dict(x=torch.zeros(2, 4, 8, 8)), "x must be \\[2, 3, 8, 8\\].* got \\[2, 4, 8, 8\\]"),
        ("sr3", dict(x=torch.zeros(1, 3, 8, 8)), "x must be \\[2, 3, 8, 8\\]"),
        ("sr3", dict(level=torch.rand(2)), "level must be a floating-point tensor \\[2, 1\\]"),
        ("sr3", dict(level=torch.tensor([[1], [2]])), "of torch.int64"),
        ("ddpm", dict(level=torch.rand(2, 1)), "level must be an int64 tensor \\[2\\]"),
        ("ddpm", dict(level=torch.tensor([1, 2, 3])), "got \\[3\\] of torch.int64"),
    ],
)
def test_refuses_inputs(variant, change, message):
    unet, _ = pair(variant)
    with pytest.raises(ValueError, match=message):
        unet(**{**good(variant), **change})


def test_refuses_x_where_unconditional():
    unet, _ = pair(inputs=3)
    with pytest.raises(ValueError, match="x must be None: this network is unconditional"):
        unet(**good())
