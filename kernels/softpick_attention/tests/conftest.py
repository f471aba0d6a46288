"""The kernel and the device that the tests run with."""

import os
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = "hf-softpick/softpick-attention"


def pytest_configure(config):
    """The mark by which the Hub's builder chooses what its CI runs."""
    config.addinivalue_line("markers", "kernels_ci: run by the CI of the Hub's kernels")


@pytest.fixture(scope="session")
def device():
    """A GPU; the CPU if TRITON_INTERPRET=1 asks for Triton's interpreter."""
    for name in ("cuda", "xpu"):
        if hasattr(torch, name) and getattr(torch, name).is_available():
            return torch.device(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1")


@pytest.fixture(scope="session")
def kernel(device):
    """The build that LOCAL_KERNELS names, else the sources beside these tests."""
    if REPOSITORY in os.environ.get("LOCAL_KERNELS", ""):
        from kernels import get_kernel

        return get_kernel(REPOSITORY, version=1)
    sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))
    import softpick_attention

    return softpick_attention
