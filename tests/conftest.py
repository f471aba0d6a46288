"""What every test gets: no network, one thread in each worker, a data cache that goes away; gpu tests skip by name."""

import functools
import os
import shutil
import sys
import tempfile
from importlib.metadata import version

import pytest
from hypothesis import settings

# Before anything imports torch or a Hugging Face library, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples on every run of CI; by hand, new ones are tried each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Marks that transformers' own tests carry.
FOREIGN_MARKS = "accelerate_tests torch_compile_test flash_attn_test flash_attn_3_test flash_attn_4_test is_fsdp_test"
FOREIGN_MARKS += " is_tensor_parallel_test is_training_test order"
# They lie in the user's own cache, which no test gets to see.
os.environ.setdefault(
    "TRANSFORMERS_TESTS",
    os.path.join(
        os.path.expanduser(os.environ.get("HF_SOFTPICK_CACHE") or "~/.cache/hf_softpick"),
        f"transformers-{version('transformers')}",
        "tests",
    ),
)

_cache = pytest.StashKey[str]()
ALLOCATING = [f"softpick_attention.{name}" for name in ("forward", "backward", "backward_prepare", "visibility")]


class Poison:
    """Stands in for the module torch: `empty` and `empty_like` begin as NaN, or as integers beyond all indices."""

    def __getattr__(self, name: str):
        import torch

        function = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return function
        return lambda *args, **options: poisoned(function(*args, **options))


def poisoned(x):
    """`x`, each byte 0xFF in floating tensors, which is NaN, and 0x7F in others."""
    import torch

    if x.numel() and x.device.type != "meta":
        x.view(torch.uint8).fill_(0xFF if x.is_floating_point() else 0x7F)
    return x


def pytest_runtest_setup() -> None:
    """What a kernel, or tiled attention, leaves unwritten is no zero by luck in any test."""
    for name in ALLOCATING:
        module = sys.modules.get(name)
        if module is not None and not isinstance(module.torch, Poison):
            module.torch = Poison()
    tiled = sys.modules.get("hf_softpick.modeling.attention_tiled")
    if tiled is not None and not hasattr(tiled._buffer, "__wrapped__"):
        buffer = tiled._buffer

        @functools.wraps(buffer)
        def fresh(old, *args):
            new = buffer(old, *args)
            return new if new is old else poisoned(new)

        tiled._buffer = fresh


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all workers of this run, so that a tokenizer is trained once; never the user's own."""
    for mark in FOREIGN_MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
    if not hasattr(config, "workerinput"):
        config.stash[_cache] = tempfile.mkdtemp(prefix="hf_softpick_tests_")
        os.environ["HF_SOFTPICK_CACHE"] = config.stash[_cache]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache."""
    if _cache in config.stash:
        shutil.rmtree(config.stash[_cache], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine cannot run; leave out the sweep, which runs only when asked for."""
    if "sweep" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("sweep")]
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=left_out)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
