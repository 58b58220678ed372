"""What README.md and docs/guide.md tell people to type: the Python runs, the commands parse, the links lead on."""

import importlib.util
import re
import shlex
from pathlib import Path

import janspiry_reference
import numpy as np
import pytest
import torch
from PIL import Image

from sr3fast import __main__ as cli

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md")


@pytest.fixture
def given(tmp_path, monkeypatch, threads):
    """What the blocks take for granted: files in the folder, a network, a source, the middle of somebody's loop."""
    threads(1)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("photo.png", "other.png"):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(name)
    theirs = janspiry_reference.diffusion(T=50, start=1e-4, end=0.3)
    torch.save(theirs.state_dict(), "I640000_E37_gen.pth")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 3, 3, padding=1)
    torch.nn.init.normal_(layer.weight, 0, 0.05)
    network = lambda h, level: layer(h)  # noqa: E731
    f_theta = lambda x, y_t, level: network(torch.cat([x, y_t], 1), level)  # noqa: E731
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    y, eps_hat = torch.randn(2, 1, 3, 8, 8)
    return {
        **dict(network=network, f_theta=f_theta, network_of_x=f_theta, x=x),
        **dict(diffusion=theirs, config={"norm_groups": 8}),
        **dict(y=y, eps_hat=eps_hat, alpha=0.99, gamma=0.5, seed=0, step=3),
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_python_runs(page, given):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert len(blocks) > 2
    for block in blocks:
        if "import diffusers" in block and importlib.util.find_spec("diffusers") is None:
            continue
        exec(compile(block, page, "exec"), given)
    assert given["y_0"].isfinite().all()


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_parse(page, monkeypatch):
    pytest.importorskip("tyro")
    parsed = []
    for name, (summary, load) in cli.COMMANDS.items():
        command = lambda load=load: load()._replace(function=lambda options: parsed.append(options) or 0)  # noqa: E731
        monkeypatch.setitem(cli.COMMANDS, name, (summary, command))
    lines = re.findall(r"^    (?:torchrun .* -m )?sr3fast (.*)$", (ROOT / page).read_text(), re.M)
    for line in lines:
        words = shlex.split(line, comments=True)
        assert cli.main([word for word in words if word != "..."]) == 0, line
    assert len(parsed) == len(lines) > 2


@pytest.mark.parametrize(
    "page", [*PAGES, "docs/design.md", "docs/performance.md", "CONTRIBUTING.md", "examples/README.md"]
)
def test_the_links_lead_on(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings], target
    for name in re.findall(r"`((?:sr3fast|csrc|kernels|benchmarks|tests|examples|docs)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
