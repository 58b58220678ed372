"""The build: CMake compiles csrc/ into sr3fast/_C, and kernels/ is installed as sr3fast.kernels."""

from setuptools import setup

setup(
    cmake_source_dir=".",
    packages=["sr3fast", "sr3fast.compat", "sr3fast.engine", "sr3fast.kernels", "sr3fast.training"],
    package_dir={"sr3fast": "sr3fast", "sr3fast.kernels": "kernels"},
    package_data={"sr3fast": ["py.typed", "models/*/*"]},
)
