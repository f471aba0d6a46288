"""Versions of what decides a result, for manifests, model cards and result files. Imports nothing heavy."""

import importlib.metadata
import platform

PACKAGES = (
    "hf_softpick torch transformers accelerate datasets tokenizers safetensors deepspeed triton numpy pydantic lm_eval"
).split()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; absent packages are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
