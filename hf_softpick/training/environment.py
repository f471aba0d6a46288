"""What a run ran on: versions, machine and commit, for environment.json, manifests and model cards. No secrets."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_softpick.analysis.run_records import launches
from hf_softpick.files import write_text
from hf_softpick.training.recipe import Recipe
from hf_softpick.versions import hub_commit, versions


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with "+changes" where files differ; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(strategy: str, world_size: int) -> dict[str, Any]:
    """This launch: when, with what command, on what. Environment variables are not recorded, they may hold tokens."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv[1:],
        "directory": os.getcwd(),
        "strategy": strategy,
        "processes": world_size,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "commit": commit(),
        "versions": versions(),
    }


def hub_commits(recipe: Recipe) -> dict[str, str]:
    """Commits of what the recipe names on the Hub, by the recipe's key; to be asked as soon as it is loaded."""
    asked = {
        "model.from": hub_commit(recipe.model.from_, recipe.model.revision),
        "tokenizer.from": hub_commit(recipe.tokenizer.from_, recipe.tokenizer.revision),
    }
    return {key: commit for key, commit in asked.items() if commit}


def trained_from(path: Path) -> dict[str, str]:
    """Commits that the run of environment.json began with."""
    return next((launch["commits"] for launch in launches(path) if launch.get("commits")), {})


def record_commits(path: Path, commits: dict[str, str]) -> None:
    """Add to the newest launch in environment.json what it loaded from the Hub."""
    if commits and (found := launches(path)):
        found[-1]["commits"] = commits
        write_text(path, json.dumps({"launches": found}, indent=1) + "\n")


def record_launch(path: Path, launch: dict[str, Any]) -> None:
    """Append `launch` to the list in environment.json: a resumed run may go on under other versions."""
    write_text(path, json.dumps({"launches": [*launches(path), launch]}, indent=1) + "\n")
