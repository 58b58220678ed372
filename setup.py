"""The build: CMake compiles csrc/ into sr3fast/_C, and kernels/ is installed as sr3fast.kernels."""

from setuptools import find_packages, setup

setup(
    cmake_source_dir=".",
    packages=[*find_packages(include=["sr3fast", "sr3fast.*"]), "sr3fast.kernels"],
    package_dir={"sr3fast": "sr3fast", "sr3fast.kernels": "kernels"},
    package_data={"sr3fast": ["py.typed", "models/*/*"]},
)
