"""What hf_softpick consists of and needs. Ranges here, tested pins in requirements.txt, tools in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "hf_softpick/__init__.py").read_text(), re.M).group(1)

REQUIRES = [
    "accelerate>=1.10",
    "annotated-types>=0.6",
    "datasets>=4.0",
    "filelock>=3.13",
    "huggingface_hub>=1.0",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "psutil>=5.9",
    "pyarrow>=17",
    "pydantic>=2.11,<3",
    "ruamel.yaml>=0.18",
    "safetensors>=0.6",
    "tokenizers>=0.22",
    "torch>=2.11",
    "tqdm>=4.66",
    "transformers>=5.17,<6",
    "wrapt>=1.16",
]

EXTRAS = {
    "gpu": ["triton>=3.6"],
    # Softmax baselines only; compiles for long.
    "flash": ["flash-attn>=2.8"],
    "eval": ["lm_eval>=0.4.9"],
    "quantization": ["bitsandbytes>=0.49", "hqq>=0.2.8", "optimum-quanto>=0.2.7", "torchao>=0.15"],
    # Compiles for long.
    "gptq": ["gptqmodel>=5"],
    "zstd": ['backports.zstd>=1; python_version < "3.14"'],
    "deepspeed": ["deepspeed>=0.19"],
    "wandb": ["wandb>=0.20"],
    "tensorboard": ["tensorboard>=2.18"],
    "dev": [
        "hypothesis>=6.100",
        "kernels>=0.17",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",
        "sentencepiece>=0.2",
        "setuptools>=70.1",
    ],
}

setup(
    name="hf_softpick",
    version=VERSION,
    description="Pretrain, evaluate and ship sink-free transformers: softpick attention in the Hugging Face ecosystem",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Named, not discovered: discovery refuses several top-level folders, and would ship eval, tests and recipes.
    packages=[*find_packages(include=["hf_softpick", "hf_softpick.*"]), "softpick_attention"],
    # The sources of the Hub kernel, from where the Hub's builder wants them.
    package_dir={"softpick_attention": "kernels/softpick_attention/torch-ext/softpick_attention"},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
