"""`pytest -p cuda_on_cpu.plugin`: the tests that every home shares, run on the emulated CUDA home alone.

SR3FAST_EMULATED names the library, SR3FAST_EMULATED_DEVICE the index of emulate.h's device.
"""

import os
from pathlib import Path

import cuda_on_cpu
from sr3fast import backend


def pytest_configure():
    functions = cuda_on_cpu.Functions(Path(os.environ["SR3FAST_EMULATED"]))
    home = cuda_on_cpu.Home(functions, int(os.environ["SR3FAST_EMULATED_DEVICE"]))
    load = backend.load
    backend.load = lambda name: home if name == "cuda" else load(name)
    backend.HOMES["cpu"] = (*backend.HOMES["cpu"], "cuda")


def pytest_plugin_registered(plugin):
    if hasattr(plugin, "homes"):  # conftest.py
        plugin.homes = lambda: [("cuda", "cpu")]
