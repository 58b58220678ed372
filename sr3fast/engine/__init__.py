"""The inference form of the UNet: the same function of (x, y_t, level), rearranged to run fast.

    run = Engine(unet).start_run(x, shape, levels)
    run.into.copy_(y_t)
    eps_hat = run(i)                    f_theta(x, y_t, levels[i])

What is rearranged is listed in `Form`, one switch each; benchmarks/test_ladder.py shows what each one gives. Two
ideas carry most of it. A bias is a number a channel, so it need not be added where it arises: it travels with
its tensor (a residual too, as `blocks.PendingSum`) until a norm adds it in passing. And everything that does not
depend on y_t is done once: x lies in the network's input, the noise embeddings of all levels are a table, the
weights are packed.

Imports go one way: gpu, convolution and winograd, form and tuned, blocks, network, capture, run, engine.
"""

from .engine import Engine, refusal
from .form import Form

__all__ = ["Engine", "Form", "refusal"]
