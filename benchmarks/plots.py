"""The plots of docs/, from benchmarks/results/*.json: python benchmarks/plots.py

A plot whose results are not there is left as it is, and said so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
OURS, OTHERS = "#1f6feb", "#b8c0cc"
Records = list[dict[str, Any]]


def bars(
    records: Records,
    figure: plt.Figure,
    key: str,
    theirs: tuple[str, ...],
    title: str,
    value: str = "ms_a_step",
    unit: str = "ms",
) -> None:
    """Horizontal bars from top to bottom, each with its value; other people's are gray."""
    axes = figure.subplots()
    names, values = [r[key] for r in records], [r[value] for r in records]
    colours = [OTHERS if name.startswith(theirs) else OURS for name in names]
    drawn = axes.barh(range(len(names)), values, color=colours, height=0.7)
    axes.bar_label(drawn, [f"{v:.3g} {unit}" for v in values], padding=4, fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(values))
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    axes.set_title(title, fontsize=10, loc="left")


def ops(records: Records, figure: plt.Figure) -> None:
    """Times faster than eager, of the homes that are kernels."""

    def name(r: dict[str, Any]) -> str:
        parts = [r["op"], "x".join(map(str, r["shape"])), r["dtype"], r["layout"], r["home"]]
        return ", ".join([*parts, f"malloc {r['malloc']}"] if r.get("malloc") else parts)

    # measured both in the common process and in one of its own: the latter
    apart = {name({**r, "malloc": None}) for r in records if r.get("malloc")}
    chosen = [{**r, "name": name(r)} for r in records if r["home"] != "torch" and name(r) not in apart]
    bars(chosen, figure, "name", ("torch",), "The ops: times faster than eager PyTorch", "x eager", "x")
    figure.axes[0].axvline(1, color="gray", ls=":", lw=1)


def steps(records: Records, figure: plt.Figure) -> None:
    """PSNR and distance from the truth's spectrum against network passes, on the grid logsnr."""
    panels = figure.subplots(1, 2)
    bicubic = next(r for r in records if r["solver"] == "bicubic")
    for axes, key, title in zip(
        panels, ("psnr", "spectrum"), ("PSNR, dB", "distance from the truth's power spectrum, dB"), strict=True
    ):
        for solver in dict.fromkeys(r["solver"] for r in records if r is not bicubic):
            mine = [r for r in records if r["solver"] == solver and r["grid"] in ("logsnr", "every step")]
            mine.sort(key=lambda r: r["steps"])
            axes.plot([r["steps"] for r in mine], [r[key] for r in mine], "o-", ms=3, lw=1, label=solver)
        axes.axhline(bicubic[key], color="gray", ls=":", lw=1, label="bicubic")
        axes.set_xscale("log")
        axes.set_xlabel("network passes", fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_yscale("log")
    panels[1].legend(frameon=False, fontsize=8)


sampling = partial(
    bars,
    key="implementation",
    theirs=("eager", "torch", "diffusers"),
    title="A sampling step of the 97.8 M network, 128 x 128",
)
ladder = partial(bars, key="rung", theirs=("eager",), title="The engine's transformations, one after the other")

PLOTS: dict[str, tuple[Callable[[Records, plt.Figure], None], tuple[float, float]]] = {
    "sampling-cpu": (sampling, (7, 2.6)),
    "ladder-cpu": (ladder, (7, 3.2)),
    "ladder-float32-cpu": (ladder, (7, 3.4)),
    "ops-cpu": (ops, (9, 4.4)),
    "ops-cuda": (ops, (9, 7)),
    "sampling-cuda": (sampling, (7, 6)),
    "ladder-cuda": (ladder, (7, 6)),
    "quality-steps": (steps, (9, 3.6)),
}


def main() -> None:
    for name, (draw, size) in PLOTS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"no {path.name}: {name}.png is left as it is")
            continue
        figure = plt.figure(figsize=size, layout="constrained")
        draw(json.loads(path.read_text())["results"], figure)
        figure.savefig(DOCS / f"{name}.png", dpi=110)
        plt.close(figure)
        print(f"wrote docs/{name}.png")


if __name__ == "__main__":
    main()
