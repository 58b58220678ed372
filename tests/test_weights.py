"""The folder format: what goes in comes out, and every wrong folder is told apart."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sr3fast import weights
from sr3fast.schedule import Schedule
from sr3fast.unet import UNet
from sr3fast.weights import Model, Structure, Target

OPTIONS = dict(channels=16, multipliers=(1, 2), blocks=1, attention=(8,), groups=8, image_size=16)


def model(**options):
    torch.manual_seed(0)
    return Model(
        UNet(**{**OPTIONS, **options}),
        Schedule.named("linear", T=500, start=1e-5, end=4e-2),
        Target("residual", k=4.0, clip=0.8),
        scale=4,
        card={"steps": 12, "solver": "ddim"},
    )


@pytest.fixture
def folder(tmp_path):
    weights.save(tmp_path / "m", model())
    return tmp_path / "m"


def rewrite(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def test_round_trip(folder):
    saved, loaded = model(), weights.load(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert loaded.unet.config == saved.unet.config
    assert (loaded.schedule, loaded.target, loaded.scale, loaded.level, loaded.card) == (
        saved.schedule,
        saved.target,
        saved.scale,
        saved.level,
        saved.card,
    )
    for (name, a), (other, b) in zip(saved.unet.state_dict().items(), loaded.unet.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert not loaded.unet.training
    assert all(p.requires_grad and p.is_leaf for p in loaded.unet.parameters())


def test_round_trip_of_betas_and_the_ddpm_variant(tmp_path):
    betas = torch.linspace(1e-5, 0.3, 60, dtype=torch.float64)
    saved = UNet(**OPTIONS, variant="ddpm")
    weights.save(tmp_path, Model(saved, Schedule.from_betas(betas), level="t"))
    loaded = weights.load(str(tmp_path))
    assert torch.equal(loaded.schedule.betas, betas)
    assert loaded.unet.config == saved.config and loaded.level == "t"
    assert loaded.target == Target() and loaded.scale is None and loaded.card == {}


def test_dtypes(tmp_path):
    weights.save(tmp_path, model(), dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["conv_in.weight"].dtype == torch.float16
    loaded = weights.load(tmp_path).unet.conv_in.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, model().unet.conv_in.weight.half().float())
    assert weights.load(tmp_path, dtype=None).unet.conv_in.weight.dtype == torch.float16


def test_a_channels_last_network_is_saved_alike(tmp_path, folder):
    last = model()
    last.unet.to(memory_format=torch.channels_last)
    weights.save(tmp_path / "last", last)
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "last"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_failed_save_leaves_what_was_there(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise weights.SafetensorError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: No space left"):
        weights.save(folder, model(channels=32))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_card_that_json_cannot_hold_writes_nothing(tmp_path):
    bad = model()
    bad.card = {"steps": torch.tensor(3)}
    with pytest.raises(TypeError):
        weights.save(tmp_path / "new", bad)
    assert not (tmp_path / "new").exists()


def test_target_residual():
    torch.manual_seed(0)
    image, x = torch.rand(2, 3, 5, 4) * 2 - 1, torch.rand(2, 3, 5, 4) * 2 - 1
    target = Target("residual", k=3.0, clip=0.5)
    y_0 = target.encode(image, x)
    assert torch.equal(y_0, (3 * (image - x)).clamp(-0.5, 0.5)) and y_0.abs().max() == 0.5
    assert torch.equal(target.decode(y_0, x), x + y_0 / 3)
    wide = Target("residual", k=3.0, clip=10.0)
    assert torch.allclose(wide.decode(wide.encode(image, x), x), image, atol=1e-6)


def test_target_image_is_the_image():
    image = torch.randn(1, 3, 2, 2)
    assert Target().encode(image, None) is image and Target().decode(image, None) is image


def test_targets_refused():
    with pytest.raises(ValueError, match="a target is one of image, residual: got 'epsilon'"):
        Target("epsilon")
    with pytest.raises(ValueError, match="a target's k must be above 0 and finite: got 0"):
        Target("residual", k=0)
    with pytest.raises(ValueError, match="a target's clip must be above 0 and finite: got inf"):
        Target("residual", clip=float("inf"))
    image = torch.zeros(1, 3, 4, 4)
    for x in (None, torch.zeros(1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"a residual needs x of the image's shape \[1, 3, 4, 4\]"):
            Target("residual").encode(image, x)


def test_model_refuses_a_level_its_network_does_not_have():
    with pytest.raises(ValueError, match="a sr3 network is not conditioned on level='t'"):
        Model(model().unet, Schedule.named(), level="t")
    with pytest.raises(ValueError, match="a ddpm network is not conditioned on level='sqrt_gamma'"):
        Model(UNet(**OPTIONS, variant="ddpm"), Schedule.named())
    with pytest.raises(ValueError, match="level must be one of"):
        Model(model().unet, Schedule.named(), level="sigma")


def test_find(folder, monkeypatch):
    assert weights.find(folder) == folder
    monkeypatch.setattr(weights, "MODELS", folder.parent)
    assert weights.shipped() == ["m"] and weights.find("m") == folder
    with pytest.raises(FileNotFoundError, match=r"no weights at 'photo-x8': .* a name that ships: m$"):
        weights.find("photo-x8")


def test_find_refuses(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        weights.load(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        weights.load(folder)
    checkpoint = tmp_path / "I1_E1_gen.pth"
    checkpoint.write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=r"got the file .*janspiry\.model reads a _gen\.pth"):
        weights.load(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "must have format 1.* got 2"),
        ({"format": "gone"}, "must have format 1.* got None"),
        ({"schedule": "gone", "scale": "gone"}, r"config\.json lacks schedule, scale"),
        ({"unet": {**OPTIONS, "width": 3}}, r"does not describe a model: .*unexpected .*'width'"),
        ({"unet": {**OPTIONS, "groups": 5}}, "groups must divide the channels: got 16 channels and groups=5"),
        ({"target": {"kind": "image", "mean": 0}}, "does not describe a model: .*'mean'"),
        ({"schedule": {"name": "linear", "T": 0}}, "T must be at least 1: got 0"),
        ({"schedule": {"name": "linear", "T": 2.5}}, "T must be a whole number: got 2.5"),
        ({"schedule": {"betas": [0.1, 1.5]}}, r"alpha_t = 1 - beta_t must be in \(0, 1\]: got beta_2 = 1.5"),
        ({"level": "t"}, "a sr3 network is not conditioned on level='t'"),
    ],
)
def test_configs_refused(folder, change, message):
    rewrite(folder, **change)
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


@pytest.mark.parametrize("text", ["{", "", "\x00\x01", "[1]", "3"])
def test_config_that_is_no_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|must have format)"):
        weights.load(folder)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_damaged_tensors(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file"):
        weights.load(folder)


def test_a_pickle_under_the_name_is_never_run(folder, tmp_path):
    class Run:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").mkdir, ())

    torch.save({"conv_in.weight": Run()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights.load(folder)
    assert not (tmp_path / "ran").exists()


def test_mismatch_names_tensors_shapes_and_the_likely_config(folder):
    rewrite(folder, unet={**OPTIONS, "multipliers": [1, 4]})
    with pytest.raises(ValueError) as error:
        weights.load(folder)
    text = str(error.value)
    assert "model.safetensors does not fit the network" in text
    first = "downs.2.conv1.weight is [32, 16, 3, 3], not [64, 16, 3, 3]"
    assert first in text and "more" in text and text.count(" is [") == 3
    assert "look like channels=16, multipliers=(1, 2), blocks=1, attention on levels (1,), in_channels=6" in text


def test_mismatch_missing_and_surplus(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["mid.0.attention.qkv.weight"]
    save_file({**tensors, "ema.decay": torch.zeros(2)}, file)
    with pytest.raises(ValueError) as error:
        weights.load(folder)
    assert "mid.0.attention.qkv.weight [96, 32, 1, 1] is missing; ema.decay [2] is one too many" in str(error.value)


def test_integer_tensors_are_refused(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "conv_in.bias": torch.zeros(16, dtype=torch.int32)}, file)
    with pytest.raises(ValueError, match=r"must hold floats: conv_in\.bias is torch\.int32"):
        weights.load(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(multipliers=(1, 2, 4, 8, 16), blocks=1, attention=(), groups=16, image_size=512),
        dict(in_channels=17, out_channels=13, attention=(16, 64), blocks=3),
        dict(multipliers=(3, 1, 2), image_size=64, attention=(64, 16), channels=32),
        dict(multipliers=(2,), attention=()),
    ],
)
def test_structure_of_tensors_is_that_of_the_config(options):
    with torch.device("meta"):
        unet = UNet(**options)
    assert Structure.of_tensors(unet.state_dict()) == Structure.of_config(unet.config)


def test_structure_of_something_else():
    with pytest.raises(ValueError, match="not the tensors of a UNet"):
        Structure.of_tensors({"weight": torch.zeros(3)})


@pytest.mark.parametrize("scale", [0.5, -4, float("nan")])
def test_a_scale_that_shrinks_is_refused(scale):
    unet = UNet(channels=8, multipliers=(1,), blocks=1, attention=(), groups=4)
    with pytest.raises(ValueError, match=f"scale must be at least 1: got {scale}"):
        Model(unet, Schedule.named("linear", T=10, start=1e-4, end=0.5), scale=scale)
