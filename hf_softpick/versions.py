"""Versions of what decides a result, for manifests, model cards and result files. Imports nothing heavy."""

import importlib.metadata
import os
import platform
import re

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


def hub_commit(name: str | None, revision: str | None = None) -> str | None:
    """Commit of a Hub model that was just loaded: what `revision` (a branch or tag) meant then.

    Args:
        name: a folder or a repository.

    Returns:
        40 hexadecimal digits; None for a folder, and for a repository that is not in the Hub cache.
    """
    if name is None or os.path.exists(name):
        return None
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="model")
    try:
        with open(os.path.join(constants.HF_HUB_CACHE, folder, "refs", revision or "main"), encoding="utf-8") as file:
            return file.read().strip() or None
    except (OSError, ValueError):
        return None
