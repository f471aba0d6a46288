"""Tests of the Triton kernels on CPU. The interpreter is chosen for a whole process when the kernels are imported, so
these run in processes of their own, under TRITON_INTERPRET=1; `make test` starts them.
"""

import importlib.util
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    _reason = "needs TRITON_INTERPRET=1 in the environment, as in `make test`"
elif importlib.util.find_spec("triton") is None:
    _reason = "Triton is not installed"
else:
    _reason = None


class _Skipped(pytest.File):
    """A file of tests that is named in the report and not imported."""

    def collect(self):
        pytest.skip(f"{self.path.name}: {_reason}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Python files without the interpreter; None leaves it to pytest."""
    return None if _reason is None else _Skipped.from_parent(parent, path=module_path)
