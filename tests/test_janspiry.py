"""Their checkpoints in our network and their objects on our loop, against a plain statement of their code."""

import copy
import json
import os
import pickle
from itertools import pairwise

import janspiry_reference as janspiry
import pytest
import torch
from safetensors.torch import save_file

from sr3fast import ops
from sr3fast.compat.janspiry import accelerate, load, model
from sr3fast.compat.janspiry.names import our_name, their_name
from sr3fast.sampler import Sampler
from sr3fast.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:gamma_T")

GROUPS = {"norm_groups": 8}
VARIANTS = ("sr3", "ddpm")
SHORT = dict(T=50, start=1e-4, end=0.3)
SHORTER = dict(T=20, start=1e-4, end=0.6)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def level_of(variant):
    return {"sr3": "sqrt_gamma", "ddpm": "t"}[variant]


def written(tmp_path, theirs, name="I10_E1_gen.pth"):
    torch.save(theirs.state_dict(), tmp_path / name)
    return tmp_path / name


def noises(shape, T, seed=3):
    """z as a function of their index t = T-1 .. 0."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(T, *shape, generator=generator)
    return lambda t: z[t]


def traced(theirs, B=2, H=12, W=16):
    torch.manual_seed(4)
    y_T = torch.randn(B, 3, H, W)
    x = torch.rand(B, 3, H, W) * 2 - 1 if theirs.conditional else None
    z = noises(y_T.shape, theirs.num_timesteps)
    with torch.no_grad():
        return x, z, theirs.run(x, None, y_T, z)


# ------------------------------------------------------------------------------------------------ load


@pytest.mark.parametrize("name", janspiry.CONFIGS)
def test_the_shipped_configs_need_no_config(tmp_path, name):
    """Their structures in full; the tensors are one number each on disk."""
    options = janspiry.CONFIGS[name]
    with torch.device("meta"):
        network = janspiry.Network(**options)
    theirs = janspiry.GaussianDiffusion(network, options["size"])
    ddpm = options.get("variant") == "ddpm"
    theirs.set_new_noise_schedule(janspiry.schedule(2000, *((1e-4, 2e-2) if ddpm else (1e-6, 1e-2))))
    state = {n: torch.full((), 0.5).expand(t.shape) if t.is_meta else t for n, t in theirs.state_dict().items()}
    if ddpm:
        state["denoise_fn.time_mlp.0.inv_freq"] = janspiry.TimeSinusoid(64).inv_freq
    assert len(state) == janspiry.TENSORS[name]
    torch.save(state, tmp_path / "a_gen.pth")
    unet, schedule = load(tmp_path / "a_gen.pth")
    assert sum(p.numel() for p in unet.parameters()) == janspiry.PARAMETERS[name]
    assert unet.config["groups"] == options["groups"] and unet.config["image_size"] == options["size"]
    assert unet.config["attention"] == options["attn_res"] and unet.config["blocks"] == options["res_blocks"]
    assert unet.config["multipliers"] == options["multiplier"] and unet.variant == options.get("variant", "sr3")
    assert unet.config["in_channels"] == options.get("inputs", 6)
    assert not unet.training and unet.conv_in.weight.requires_grad
    assert schedule.T == 2000
    expected = Schedule.named("linear", 2000, *((1e-4, 2e-2) if ddpm else (1e-6, 1e-2)))
    assert torch.allclose(schedule.gamma, expected.gamma, rtol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("T", [50, 2000])
def test_each_step_and_the_free_run_are_theirs(tmp_path, variant, T):
    long = dict(T=2000, multiplier=(1,))
    theirs = janspiry.diffusion(variant=variant, **(SHORT if T == 50 else long))
    unet, schedule = load(written(tmp_path, theirs), config=GROUPS)
    x, z, trace = traced(theirs, B=2, H=4, W=5 if T == 2000 else 8)
    sampler = Sampler(unet, schedule, solver="ddpm", level=level_of(variant))

    def of_step(step):
        return z(step - 1)

    run = [y for _, y in sampler.iterate(x, y_T=trace[0], z=of_step)]
    error = max((y - y_).abs().max().item() for y, y_ in zip(run, trace[1:], strict=True))
    assert error < (1e-5 if T == 50 else 2e-5)

    levels = sampler.table.levels(sampler.level)
    worst = 0.0
    for i in {*range(0, T, max(T // 50, 1)), T - 2, T - 1}:
        level = theirs.level(T - 1 - i, 2)
        assert torch.allclose(levels[i].float(), level.flatten()[0].float(), rtol=1e-7)
        with torch.no_grad():
            row = sampler.table.rows[i].tolist()
            y, _ = ops.solver_step(trace[i], unet(x, trace[i], level), row, None, T - i, z=z(T - 1 - i))
        worst = max(worst, (y - trace[i + 1]).abs().max().item())
    assert worst < 1e-6


def test_unconditional_and_other_channels(tmp_path):
    for inputs, outputs in ((3, 3), (1, 1), (2, 1), (5, 1)):
        theirs = janspiry.diffusion(inputs=inputs, outputs=outputs, **SHORT)
        unet, _ = load(written(tmp_path, theirs), config=GROUPS)
        assert (unet.in_channels, unet.out_channels) == (inputs, outputs)
        x, y = torch.randn(1, inputs - outputs, 8, 8), torch.randn(1, outputs, 8, 8)
        level = torch.full((1, 1), 0.7)
        with torch.no_grad():
            ours = unet(x if inputs > outputs else None, y, level)
            assert torch.allclose(ours, theirs.denoise_fn(torch.cat([x, y], 1), level), atol=1e-5)


def test_everything_but_groups_is_inferred(tmp_path):
    for options in (
        dict(multiplier=(1, 2), res_blocks=3, attn_res=(16, 8)),
        dict(multiplier=(1, 1, 2, 2), attn_res=(4,), inner=24),
        dict(multiplier=(1,), attn_res=(), variant="ddpm"),
    ):
        theirs = janspiry.diffusion(**options, **SHORT)
        unet, _ = load(written(tmp_path, theirs), config=GROUPS)
        x, y = torch.randn(2, 1, 3, 16, 8)
        level = theirs.level(20, 1)
        with torch.no_grad():
            expected = theirs.denoise_fn(torch.cat([x, y], 1), level)
            assert torch.allclose(unet(x, y, level), expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_go_both_ways(variant):
    theirs = janspiry.diffusion(variant=variant, **SHORT).denoise_fn
    for name, _ in theirs.named_parameters():
        assert their_name(our_name(name), variant) == name


def test_groups_are_asked_for_and_used(tmp_path):
    theirs = janspiry.diffusion(**SHORT)
    path = written(tmp_path, theirs)
    with pytest.raises(ValueError, match=r"norm_groups cannot be read .* multipliers=\(1, 2, 4\).*") as error:
        load(path)
    assert 'config={"norm_groups": 32}' in str(error.value)
    x, y, level = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.full((1, 1), 0.5)
    with torch.no_grad():
        expected = theirs.denoise_fn(torch.cat([x, y], 1), level)
        assert torch.allclose(load(path, GROUPS)[0](x, y, level), expected, atol=1e-5)
        assert not torch.allclose(load(path, {"norm_groups": 4})[0](x, y, level), expected, atol=1e-2)


JSON = """{
    "name": "sr", // http: their parser cuts here
    "model": {
        "which_model_G": "sr3", // use the ddpm or sr3 network structure
        "unet": {
            "in_channel": 6, "out_channel": 3, "inner_channel": 32, %s
            "channel_multiplier": [1, 2],
            "attn_res": [
                // 16
            ],
            "res_blocks": 1, "dropout": 0.1
        },
        "beta_schedule": { // use munual beta_schedule for acceleration
            "train": {"schedule": "linear", "n_timestep": 2000, "linear_start": 1e-6, "linear_end": 1e-2},
            "val": {"schedule": "linear", "n_timestep": %d, "linear_start": 1e-4, "linear_end": 0.3}
        },
        "diffusion": {"image_size": 64, "channels": 3, "conditional": true}
    }
}"""
OF_JSON = dict(inner=32, multiplier=(1, 2), res_blocks=1, attn_res=(), size=64)


def test_config_as_their_json(tmp_path):
    path = written(tmp_path, janspiry.diffusion(**OF_JSON, groups=16, **SHORT))
    file = tmp_path / "sr.json"
    file.write_text(JSON % ('"norm_groups": 16,', 50))
    unet, schedule = load(path, file)
    assert unet.config == {
        "channels": 32,
        "multipliers": (1, 2),
        "blocks": 1,
        "attention": (),
        "groups": 16,
        "dropout": 0.1,
        "image_size": 64,
        "in_channels": 6,
        "out_channels": 3,
        "variant": "sr3",
    }
    assert schedule.T == 50
    file.write_text(JSON % ("", 50))
    assert load(path, str(file))[0].config["groups"] == 32
    file.write_text(JSON % ('"norm_groups": null,', 50))
    assert load(path, str(file))[0].config["groups"] == 32
    parsed = json.loads("\n".join(line.split("//")[0] for line in file.read_text().splitlines()))
    assert load(path, parsed)[0].config["groups"] == 32
    assert load(path, parsed["model"])[0].config["groups"] == 32
    assert load(path, {"norm_groups": 8, "which_model_G": "sr3"})[0].config["groups"] == 8
    assert load(path, {"groups": 8, "dropout": 0.5})[0].config["dropout"] == 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_knows_its_level_and_its_scale(tmp_path, variant):
    path = written(tmp_path, janspiry.diffusion(variant=variant, **SHORT))
    made, (unet, schedule) = model(path, GROUPS), load(path, GROUPS)
    assert made.level == level_of(variant) and made.scale is None and made.schedule == schedule
    assert all(torch.equal(t, unet.state_dict()[n]) for n, t in made.unet.state_dict().items())
    assert model(path, GROUPS, scale=2.5).scale == 2.5


def test_the_scale_is_the_configs(tmp_path):
    path = written(tmp_path, janspiry.diffusion(**SHORT))
    sizes = {"l_resolution": 16, "r_resolution": 128}
    for datasets, scale in (
        ({"train": {"name": "FFHQ", **sizes}, "val": sizes}, 8),
        ({"val": sizes}, 8),
        ({"train": {"l_resolution": 64}, "val": None}, None),
        (None, None),
    ):
        config = {"model": {"unet": {"norm_groups": 8}}, "datasets": datasets}
        assert model(path, config).scale == scale
        (tmp_path / "mine.json").write_text(json.dumps(config, indent=1) + " // theirs")
        assert model(path, tmp_path / "mine.json").scale == model(path, str(tmp_path / "mine.json")).scale == scale
        (tmp_path / "sr_4_16.json").write_text(json.dumps(config))
        assert model(path, tmp_path / "sr_4_16.json").scale == (scale or 4)
        assert model(path, config, scale=8).scale == 8
    with pytest.raises(ValueError, match="the scale is the config's: got scale 4, and a config of 8"):
        model(path, {"model": {"unet": {"norm_groups": 8}}, "datasets": {"val": sizes}}, scale=4)


def test_a_config_with_another_schedule_is_told(tmp_path):
    path = written(tmp_path, janspiry.diffusion(**OF_JSON, groups=16, **SHORT))
    (tmp_path / "sr.json").write_text(JSON % ("", 20))
    with pytest.warns(UserWarning, match=r"T=20.* is not the checkpoint's.*T=50.*give Sampler steps="):
        assert load(path, tmp_path / "sr.json")[1].T == 50


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "sr_sr3_16_128",
            "channel_multiplier is .* there and \\(1, 2, 4\\) in the tensors|inner_channel is 64",
        ),
        ({"norm_groups": 8, "inner_channel": 32}, "inner_channel is 32 there and 16 in the tensors"),
        ({"norm_groups": 8, "channel_multiplier": [1, 2]}, "channel_multiplier is \\(1, 2\\) there"),
        (
            {"norm_groups": 8, "attn_res": [4], "image_size": 16},
            "attn_res \\[4\\] at image_size 16 .* \\(2,\\)",
        ),
        ({"norm_groups": 5}, "groups must divide the channels: got 16 channels and groups=5"),
        ({"norm_group": 8}, "a config has 'model', or some of inner_channel, .*: got norm_group"),
        (
            {"model": {"which_model_G": "ddpm", "unet": {}}},
            "which_model_G is ddpm there and sr3 in the tensors",
        ),
    ],
)
def test_configs_that_contradict_the_tensors(tmp_path, config, message):
    path = written(tmp_path, janspiry.diffusion(**SHORT))
    with pytest.raises(ValueError, match=message):
        load(path, config)


def test_configs_that_are_none(tmp_path):
    path = written(tmp_path, janspiry.diffusion(**SHORT))
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of sr_sr3_16_128"):
        load(path, "sr_sr3_16_256")
    (tmp_path / "bad.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON with // comments"):
        load(path, tmp_path / "bad.json")
    with pytest.raises(TypeError, match="config must be a name, a path or a dict: got int"):
        load(path, 32)


def test_other_ways_of_saving_the_same(tmp_path):
    theirs = janspiry.diffusion(**SHORT)
    state = theirs.state_dict()
    expected = load(written(tmp_path, theirs), GROUPS)[0].state_dict()
    torch.save({f"module.{n}": t for n, t in state.items()}, tmp_path / "parallel.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe.safetensors")
    half = {n: t.half() if n.startswith("denoise_fn") else t for n, t in state.items()}
    torch.save(half, tmp_path / "half.pth")
    for name in ("I10_E1", "parallel.pth", "old.pth", "safe.safetensors", "half.pth"):  # I10_E1: resume_state
        unet, schedule = load(tmp_path / name, GROUPS)
        assert schedule.T == 50
        for n, t in unet.state_dict().items():
            assert t.dtype == torch.float32
            assert torch.equal(t, expected[n]) or (name == "half.pth" and torch.equal(t, expected[n].half()))


def test_a_bare_network_takes_the_configs_schedule(tmp_path):
    theirs = janspiry.diffusion(**OF_JSON, groups=16, **SHORT)
    torch.save(theirs.denoise_fn.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth has no betas: pass as config="):
        load(tmp_path / "bare.pth", {"norm_groups": 16})
    (tmp_path / "sr.json").write_text(JSON % ('"norm_groups": 16,', 50))
    _, schedule = load(tmp_path / "bare.pth", tmp_path / "sr.json")
    assert torch.allclose(schedule.gamma[1:].float(), theirs.alphas_cumprod)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Run:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    state = janspiry.diffusion(**SHORT).state_dict()
    for zipped in (True, False):
        torch.save({**state, "evil": Run()}, tmp_path / "a_gen.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"was refused: besides tensors it pickles \w+\.mkdir") as error:
            load(tmp_path / "a_gen.pth", GROUPS)
        assert "torch.save(netG.state_dict(), path)" in str(error.value)
        assert not (tmp_path / "ran").exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole_gen.pth")
    with pytest.raises(ValueError, match=r"was refused: besides tensors it pickles torch\.nn"):
        load(tmp_path / "whole_gen.pth")


def test_a_checkpoint_that_is_cut_anywhere_is_told(tmp_path):
    whole = written(tmp_path, janspiry.diffusion(**SHORT)).read_bytes()
    for i in range(1, 64):
        (tmp_path / "b_gen.pth").write_bytes(whole[: len(whole) * i // 64])
        with pytest.raises(ValueError, match=r"b_gen\.pth is (damaged|not a)"):
            load(tmp_path / "b_gen.pth", GROUPS)


@pytest.mark.parametrize("content", ["empty", "text", "cut", "pickle", "zip", "png"])
def test_files_of_another_kind(tmp_path, content):
    whole = written(tmp_path, janspiry.diffusion(**SHORT)).read_bytes()
    data = {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "cut": whole[: len(whole) // 2],
        "pickle": b"\x80\x02]q\x00.",
        "zip": b"PK\x05\x06" + bytes(18),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }[content]
    (tmp_path / "b_gen.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"b_gen\.pth (is not a|must hold|is damaged)") as error:
        load(tmp_path / "b_gen.pth", GROUPS)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing, nor at .*nothing_gen\.pth"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)
    torch.save({"epoch": 1, "iter": 2, "scheduler": None, "optimizer": {}}, tmp_path / "I2_E1_opt.pth")
    with pytest.raises(ValueError, match=r"holds the optimizer: the network is in I2_E1_gen\.pth"):
        load(tmp_path / "I2_E1_opt.pth")
    (tmp_path / "I2_E1_opt.pth").rename(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds an optimizer's state: .* ends in _gen\.pth"):
        load(tmp_path / "other.pth")
    torch.save({"epoch": 1, "weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="must hold a state dict, names to tensors: got a dict with 'epoch': int"):
        load(tmp_path / "other.pth")


def test_checkpoints_of_another_network(tmp_path):
    state = janspiry.diffusion(**SHORT).state_dict()
    path = tmp_path / "c_gen.pth"

    def refused(changed, message):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=message):
            load(path, GROUPS)

    refused(
        {"conv1.weight": torch.zeros(3)},
        r"no checkpoint .* it has no denoise_fn\.downs\.0\.weight \(it begins",
    )
    refused(
        {**state, "denoise_fn.mid.0.cross.weight": torch.zeros(3)},
        r"mid\.0\.cross\.weight \[3\] is no tensor",
    )
    name = "denoise_fn.ups.0.res_block.block1.block.3.weight"
    shape = list(state[name].shape)
    refused(
        {**state, name: torch.zeros(5)},
        rf"does not fit the network: ups\.0\.\S*block1\.block\.3\.weight is \[5\], not \[{shape[0]}, .*look",
    )
    refused(
        {n: t for n, t in state.items() if n != name},
        r"ups\.0\.res_block\.block1\.block\.3\.weight .* is missing",
    )
    refused({n: t for n, t in state.items() if "noise_level_mlp" not in n}, "neither noise_level_mlp nor time_mlp")
    affine = "denoise_fn.downs.1.res_block.noise_func.noise_func.0.weight"
    refused({**state, affine: torch.zeros(32, 16)}, r"noise_func\.0\.weight is \[32, 16\], not \[16, 16\]")
    ddpm = janspiry.diffusion(variant="ddpm", **SHORT).state_dict()
    ddpm["denoise_fn.time_mlp.0.inv_freq"] *= 1.1
    refused(ddpm, r"time_mlp\.0\.inv_freq must be 10000\^\(-i/n\)")
    refused({**state, "betas": torch.ones(50)}, r"alpha_t = 1 - beta_t must be in \(0, 1\]")


# ------------------------------------------------------------------------------------------ accelerate


def their_way(theirs, call):
    torch.manual_seed(11)
    result = call(copy.deepcopy(theirs))
    return result, torch.get_rng_state()


def our_way(theirs, call, **options):
    fast = accelerate(copy.deepcopy(theirs), rng="torch", **options)
    torch.manual_seed(11)
    result = call(fast)
    return result, torch.get_rng_state()


@pytest.mark.parametrize("continous", [False, True])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_super_resolution_is_theirs(variant, B, continous):
    theirs = janspiry.diffusion(variant=variant, **SHORTER)
    torch.manual_seed(5)
    x = torch.rand(B, 3, 8, 12) * 2 - 1

    def call(d):
        return d.super_resolution(x, continous)

    expected, state = their_way(theirs, call)
    strict, our_state = our_way(theirs, call, strict=True)
    assert torch.equal(state, our_state)
    assert strict.shape == expected.shape and torch.allclose(strict, expected, atol=1e-5)
    every, _ = our_way(theirs, call)
    if continous:
        assert torch.equal(every, strict) and torch.equal(every[:B], x)
        assert len(every) == B * (1 + len(range(0, 20, 3)))
    elif B == 1:
        assert torch.equal(every, strict) and every.shape == (3, 8, 12)
    else:
        assert every.shape == (3, 3, 8, 12) and torch.equal(every[-1], strict)


@pytest.mark.parametrize("continous", [False, True])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sample_is_theirs(variant, B, continous):
    theirs = janspiry.diffusion(variant=variant, inputs=3, **SHORTER)

    def call(d):
        return d.sample(B, continous=continous)

    expected, state = their_way(theirs, call)
    strict, our_state = our_way(theirs, call, strict=True)
    assert torch.equal(state, our_state)
    assert strict.shape == expected.shape and torch.allclose(strict, expected, atol=1e-5)
    every, _ = our_way(theirs, call)
    several = variant == "sr3" and not continous and B > 1
    assert every.shape == ((B, *expected.shape) if several else expected.shape)
    assert torch.equal(every[-1] if several else every, strict)


@pytest.mark.parametrize("parallel", [False, True])
def test_their_training_wrapper(parallel):
    theirs = janspiry.diffusion(dropout=0.5, **SHORTER)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.manual_seed(11)
    expected = janspiry.Wrapper(copy.deepcopy(theirs), parallel).test(x)
    wrapper = janspiry.Wrapper(copy.deepcopy(theirs), parallel)
    assert accelerate(wrapper, rng="torch") is wrapper
    torch.manual_seed(11)
    assert torch.allclose(wrapper.test(x), expected, atol=1e-5)
    assert wrapper.netG.training  # as their test() leaves it


def test_follows_the_schedule_and_the_weights():
    theirs = janspiry.diffusion(**SHORTER)
    fast = accelerate(copy.deepcopy(theirs), rng="torch")
    x = torch.rand(2, 3, 8, 8) * 2 - 1

    def agree():
        torch.manual_seed(1)
        expected = theirs.super_resolution(x)
        torch.manual_seed(1)
        result = fast.super_resolution(x)[-1]
        assert torch.allclose(result, expected, atol=1e-5)
        return result

    results = [agree()]
    for d in (theirs, fast):
        d.set_new_noise_schedule(janspiry.schedule(30, 1e-3, 0.4))
    results.append(agree())
    other = janspiry.diffusion(seed=9, **SHORTER).denoise_fn
    for d in (theirs, fast):
        d.denoise_fn.load_state_dict(other.state_dict())
    results.append(agree())
    for d in (theirs, fast):
        with torch.no_grad():
            d.denoise_fn.final_conv.block[3].bias += 0.2  # as an optimizer does
    results.append(agree())
    for d in (theirs, fast):
        d.denoise_fn.final_conv.block[3].bias = torch.nn.Parameter(torch.full((3,), -0.3))
    results.append(agree())
    for d in (theirs, fast):
        weight = d.denoise_fn.mid[0].res_block.block1.block[3].weight
        weight.data = 1.5 * weight.data
    results.append(agree())
    for d in (theirs, fast):
        d.denoise_fn = copy.deepcopy(other)
    results.append(agree())
    for a, b in pairwise(results):
        assert not torch.allclose(a, b, atol=1e-3)  # each change shows


def test_leaves_the_object_as_it_was():
    theirs = janspiry.diffusion(dropout=0.3, **SHORTER)
    theirs.denoise_fn.downs[0].weight.requires_grad_(False)
    names, modules = list(theirs.state_dict()), [n for n, _ in theirs.named_modules()]
    theirs.train()
    theirs.mid_is_frozen = theirs.denoise_fn.mid.eval()
    modes = {n: m.training for n, m in theirs.named_modules()}
    accelerate(theirs)
    theirs.super_resolution(torch.zeros(1, 3, 8, 8))
    del theirs.mid_is_frozen
    modes = {n: v for n, v in modes.items() if not n.startswith("mid_is_frozen")}
    assert modes == {n: m.training for n, m in theirs.named_modules()}
    assert list(theirs.state_dict()) == names and [n for n, _ in theirs.named_modules()] == modules
    assert not theirs.denoise_fn.downs[0].weight.requires_grad
    assert theirs.denoise_fn.mid[0].res_block.res_conv is not None
    assert "super_resolution" in vars(theirs)
    del theirs.super_resolution, theirs.sample
    assert theirs.super_resolution.__func__ is janspiry.GaussianDiffusion.super_resolution


def test_a_copy_samples_with_its_own_weights():
    theirs = accelerate(janspiry.diffusion(**SHORTER), seed=1)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    before = theirs.super_resolution(x)
    ema = copy.deepcopy(theirs)
    assert ema.super_resolution.__self__.diffusion is ema
    assert ema.super_resolution.__self__.sampler is None  # it may hold captured graphs
    assert torch.equal(pickle.loads(pickle.dumps(theirs)).super_resolution(x), before)
    assert torch.equal(ema.super_resolution(x), before)
    with torch.no_grad():
        ema.denoise_fn.final_conv.block[3].bias += 0.5
    assert not torch.allclose(ema.super_resolution(x), before, atol=1e-3)
    assert torch.equal(theirs.super_resolution(x), before)


def test_noise_v1_is_the_default_and_batch_invariant():
    theirs = janspiry.diffusion(**SHORTER)
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    fast = accelerate(theirs, seed=7)
    together = fast.super_resolution(x)
    alone = [accelerate(theirs, seed=7 + i).super_resolution(x[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    unet = fast.super_resolution.__self__.network.f_theta
    schedule = Schedule.from_betas(theirs.betas)
    assert torch.equal(together, Sampler(unet, schedule, solver="ddpm")(x, 7))

    fast = accelerate(theirs)
    torch.manual_seed(2)
    first, second = fast.super_resolution(x), fast.super_resolution(x)
    torch.manual_seed(2)
    assert torch.equal(fast.super_resolution(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_steps(variant):
    theirs = janspiry.diffusion(variant=variant, **SHORTER)
    level = level_of(variant)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    fast = accelerate(theirs, steps=5, seed=3)
    result = fast.super_resolution(x)
    sampler = fast.super_resolution.__self__.sampler
    assert len(sampler.table) == 5
    plain = Sampler(sampler.f_theta, Schedule.from_betas(theirs.betas), steps=5, level=level)
    assert torch.equal(result, plain(x, 3))
    assert fast.super_resolution(x, continous=True).shape == (2 * (1 + 5), 3, 8, 8)
    explicit = accelerate(theirs, steps=5, seed=3, solver="ddim", grid="t", eta=0.5)
    options = dict(steps=5, solver="ddim", grid="t", eta=0.5, level=level)
    assert torch.equal(explicit.super_resolution(x), Sampler(sampler.f_theta, plain.schedule, **options)(x, 3))


class Edited(janspiry.Network):
    """Their names and shapes, another function."""

    def forward(self, v, level):
        return super().forward(v, level) * 1.1


class Foreign(torch.nn.Module):
    """A network of the user's own in their object."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, v, level):
        assert level.shape == (len(v), 1)
        return self.conv(v) * level[:, :, None, None]


def test_a_network_of_their_own_is_called_as_it_is():
    theirs = janspiry.diffusion(**SHORTER)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    edited, foreign = Edited(16, (1, 2), 1, (), 8, 16), Foreign()
    for network, why, options in (
        (edited, "its forward is another function", {}),
        (foreign, "no network of Janspiry's SR3 code", {"level": "sqrt_gamma"}),
    ):
        network.variant = "sr3"
        theirs.denoise_fn = network
        expected, state = their_way(theirs, lambda d: d.super_resolution(x))
        with pytest.warns(UserWarning, match=f"denoise_fn is called as it is.*{why}"):
            result, our_state = our_way(theirs, lambda d: d.super_resolution(x), strict=True, **options)
        assert torch.allclose(result, expected, atol=1e-5) and torch.equal(state, our_state)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="level must say what denoise_fn is"):
        accelerate(theirs)


def test_accelerate_refuses():
    theirs = janspiry.diffusion(**SHORTER)
    with pytest.raises(TypeError, match=r"Network has no denoise_fn, super_resolution, sample"):
        accelerate(theirs.denoise_fn)
    with pytest.raises(TypeError, match="int has no denoise_fn"):
        accelerate(3)
    with pytest.raises(ValueError, match='rng must be "noise_v1" or "torch": got \'numpy\''):
        accelerate(theirs, rng="numpy")
    with pytest.raises(ValueError, match="solver must be one of"):
        accelerate(theirs, solver="euler")
    with pytest.raises(TypeError, match="stepps"):
        accelerate(theirs, stepps=3)
    assert "super_resolution" not in vars(theirs)
    with pytest.raises(ValueError, match="this network is conditional: call super_resolution"):
        accelerate(theirs).sample(2)
    free = accelerate(janspiry.diffusion(inputs=3, **SHORTER))
    with pytest.raises(ValueError, match="this network is unconditional: call sample"):
        free.super_resolution(torch.zeros(1, 3, 8, 8))
    bare = janspiry.GaussianDiffusion(theirs.denoise_fn, 16)
    with pytest.raises(ValueError, match="call set_new_noise_schedule first"):
        accelerate(bare).super_resolution(torch.zeros(1, 3, 8, 8))
