"""sr3fast: SR3 (Image Super-Resolution via Iterative Refinement, Saharia et al. 2021), fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module, imported when first used: `import sr3fast` stays light
_PUBLIC = {
    "Sampler": "sampler",
    "Schedule": "schedule",
    "UNet": "unet",
    "evaluate": "evaluation",
    "load": "weights",
    "upscale": "upscaling",
}
__all__ = ["Sampler", "Schedule", "UNet", "evaluate", "load", "ops", "upscale"]

if TYPE_CHECKING:
    from . import ops
    from .evaluation import evaluate
    from .sampler import Sampler
    from .schedule import Schedule
    from .unet import UNet
    from .upscaling import upscale
    from .weights import load


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
