"""The launch commands that users type, for two processes, and a way to run one to its end."""

import socket
import subprocess
import sys

from training_runs import REPOSITORY, environment


def accelerate(config, *arguments):
    """`accelerate launch` with a file of recipes/accelerate, or with flags of its own."""
    flags = [config] if str(config).startswith("--") else ["--config_file", REPOSITORY / "recipes/accelerate" / config]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, *flags, "--num_processes", "2", "--main_process_port", "0", *arguments]


def deepspeed(*arguments):
    """`deepspeed --module hf_softpick.train`."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_port", str(free_port())]
    return [*launcher, "--module", "hf_softpick.train", *arguments]


def free_port() -> int:
    """A port that nobody listens on; other test workers may be launching at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_command(*command, timeout=150):
    """Run a launcher in the repository (recipes/accelerate/zero3.yaml names its JSON from there)."""
    command = [str(part) for part in command]
    return subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
