"""The floors of the package: imports only go down."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sr3fast"
KERNELS = PACKAGE.parent / "kernels"

FLOORS = [
    {"device", "noise", "schedule", "image"},
    {"reference", "solver", "backend", "native", "contract"},
    {"registration"},
    {"ops"},
    {"unet"},
    {"weights", "engine"},
    {"sampler", "data", "metrics", "bound"},
    {"training", "upscaling"},
    {"compat", "evaluation"},
    {"jobs"},
    {"__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# of a package's modules, each imports only those before it
INSIDE = {
    "engine": ("gpu", "convolution", "winograd", "form", "tuned", "blocks", "network", "capture", "run", "engine"),
    "compat/janspiry": ("names", "configs", "checkpoint", "sampling"),
    "training": ("algorithm", "config", "model", "ranks", "trainer", "validation", "loop"),
}


def modules():
    """(path, name on the floors) of every module; all of compat is one floor."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").parts
        if place != ("__init__",) and place[0] != "models":
            yield path, place[0]


def imported(path):
    """The modules of sr3fast that a file imports, wherever in the file, and what else it imports."""
    ours, others = set(), set()
    package = ("sr3fast", *path.relative_to(PACKAGE).parts[:-1]) if path.is_relative_to(PACKAGE) else ("kernels",)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "sr3fast" and rest:
                ours.add(rest[0])
            else:
                others.add(first)
    return ours, others


@pytest.mark.parametrize(("path", "name"), [pytest.param(*m, id=str(m[0].relative_to(PACKAGE))) for m in modules()])
def test_imports_go_down(path, name):
    assert name in FLOOR, f"{name} has no floor: give it one in FLOORS"
    ours, _ = imported(path)
    for other in ours & FLOOR.keys() - {name}:
        assert FLOOR[other] < FLOOR[name], f"{name} (floor {FLOOR[name] + 1}) imports {other} ({FLOOR[other] + 1})"


@pytest.mark.parametrize("package", INSIDE)
def test_a_package_has_its_order_too(package):
    order = INSIDE[package]
    assert {path.stem for path in (PACKAGE / package).glob("*.py")} == {*order, "__init__"}
    for i, name in enumerate(order):
        for node in ast.walk(ast.parse((PACKAGE / package / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert {*names} <= {*order[:i]}, f"{package}/{name}.py imports {names}"


def test_every_floor_is_inhabited():
    assert FLOOR.keys() <= {name for _, name in modules()}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.name)
def test_kernels_stand_beside(path):
    ours, others = imported(path)
    assert not ours and others <= {"torch", "triton", "kernels", *sys.stdlib_module_names}


def test_csrc_includes_no_torch_header():
    for path in (PACKAGE.parent / "csrc").rglob("*.*"):
        lines = [line for line in path.read_text().splitlines() if line.strip().startswith("#include")]
        assert not [line for line in lines if "torch" in line or "ATen" in line or "c10" in line], path.name
