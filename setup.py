"""Packaging: `tinymim_fast`, with the folder kernels/ installed as `tinymim_fast.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "tinymim_fast" / "version.py").read_text())[1]

EXPORT = ["onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.22"]
TRAIN = [
    "timm>=1.0.31,<1.1",
    "deepspeed>=0.19,<0.20",
    "xformers>=0.0.35",
    "torchvision>=0.26",
    "safetensors>=0.5",
    "jsonargparse[signatures]>=4.40",
    "PyYAML>=6",
    "tensorboard>=2.18",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "Pillow>=11",
]

setup(
    name="tinymim_fast",
    version=VERSION,
    description="Distil vision transformers by token relations, with fused kernels",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Without symbolic links, which some checkouts and archives lack, find_packages does not see the kernels.
    packages=sorted({*find_packages(include=["tinymim_fast", "tinymim_fast.*"]), "tinymim_fast.kernels"}),
    package_dir={"tinymim_fast": "tinymim_fast", "tinymim_fast.kernels": "kernels"},
    package_data={"tinymim_fast.recipes": ["*.yaml", "*/*.yaml"], "tinymim_fast.kernels": ["*.cpp"]},
    install_requires=[
        "torch>=2.9",  # pins triton 3.5, the first that compiles the kernels without spills
        "triton>=3.5; platform_system == 'Linux'",
        "numpy>=1.26",
    ],
    extras_require={
        "train": [*TRAIN, "nvidia-dali-cuda130>=2.4,<3; platform_system == 'Linux'"],
        "train-cu12": [*TRAIN, "nvidia-dali-cuda120>=2.2,<3; platform_system == 'Linux'"],
        "corruptions": ["imagecorruptions-imaug>=1.1.5"],  # evaluate --make-corruptions
        "export": EXPORT,  # export --formats onnx
        "torchao": ["torchao>=0.18"],  # --teacher-precision fp8, and int8 on a GPU
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "transformers>=5",
            "lightning>=2.5",
            "accelerate>=1.10",
            *EXPORT,
        ],
    },
)
