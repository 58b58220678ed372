"""Training SR3: Algorithm 1 of Saharia et al. 2021 (arXiv:2104.07636) on the fused ops.

`denoising_loss` is the algorithm, `Trainer.step` one iteration of it, `train` the loop around it. A run is
known from its configuration: data, noise, t and gamma are functions of (seed, iteration, place in the global
batch), so any number of ranks sees the same batches, and a resumed run goes on, bit for bit on the CPU.

Imports go one way: algorithm and config, model, ranks, trainer, validation, loop.
"""

from .algorithm import denoising_loss, p_gamma
from .config import TrainConfig, TrainingError, learning_rate
from .loop import LOG, SHEET, train
from .model import FRESH, fresh
from .trainer import CHECKPOINT, EXPORT, Trainer, resumed
from .validation import validate

__all__ = [
    "CHECKPOINT",
    "EXPORT",
    "FRESH",
    "LOG",
    "SHEET",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "denoising_loss",
    "fresh",
    "learning_rate",
    "p_gamma",
    "resumed",
    "train",
    "validate",
]
