"""Checkpoints and objects of Janspiry/Image-Super-Resolution-via-Iterative-Refinement, most users' SR3 code.

unet, schedule = load("I640000_E37_gen.pth")        their weights in our network
model("I640000_E37_gen.pth", scale=8)               the same as a weights.Model, for upscale and train
accelerate(diffusion)                               their object, sampling with our loop

Imports go one way: names, configs, checkpoint and sampling.
"""

from .checkpoint import load, model, moments
from .configs import CONFIGS
from .sampling import accelerate

__all__ = ["CONFIGS", "accelerate", "load", "model", "moments"]
