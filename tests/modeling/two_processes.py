"""Functions that run in several processes with a gloo group between them, on CPU."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

from hf_softpick.modeling import modeling_softpick


def start_processes(function: Callable, arguments: tuple, processes: int) -> None:
    """`function(rank, *arguments)` in each; an error in one is raised here."""
    # Imports take longer than most of these tests; a server that has done them forks the processes.
    multiprocessing.set_forkserver_preload([modeling_softpick.__name__, "torch.distributed.fsdp"])
    torch.multiprocessing.start_processes(_start, (function, arguments), nprocs=processes, start_method="forkserver")


def start_group(function: Callable, arguments: tuple, processes: int = 2) -> None:
    """The same, within a process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_join, (function, arguments, processes, port), processes)


def _start(rank: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    function(rank, *arguments)


def _join(rank: int, function: Callable, arguments: tuple, processes: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()
