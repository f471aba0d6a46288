"""Compile and check kernels in several processes at once, before anything is timed: one process would take minutes."""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from attention_peers import Peer
from attention_reference import check
from gpu_cases import Case

Job = tuple[Peer, Case, bool]
MOST_PROCESSES = 12  # each holds a context of about half a GiB on the device


def check_job(job: Job, device: str) -> str:
    """What `check` says about a peer at a small size; Triton's cache on disk keeps what was compiled for it."""
    peer, case, backward = job
    return check(peer.build(case, device), case, peer.normalizer, device, backward)


def check_in_parallel(jobs: Iterable[Job], device: str) -> dict[Job, str]:
    """Verdicts by job. One that raised is left out: done again in the calling process, it raises where one sees it."""
    jobs, found = list(jobs), {}
    processes = max(1, min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs)))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(check_job, job, device)) for job in jobs]:
            try:
                found[job] = future.result()
            except BrokenProcessPool:
                break
            except Exception:
                continue
    return found
