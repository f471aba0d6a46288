"""A line of code reads downward only: train -> training -> analysis, conversion -> data, modeling. Read from the
imports, not from habits."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_softpick"
KERNELS = PACKAGE.parent / "kernels"
KERNEL_FILES = sorted(KERNELS.glob("*/torch-ext/**/*.py"))

# Layer -> what else of ours it may import. The files of the package itself are the command lines, above everything.
ALLOWED = {
    "modeling": {"softpick_attention"},
    "data": {"errors", "files", "modeling.documents"},
    "training": {"analysis", "conversion", "data", "modeling", "errors", "files", "generation_settings", "versions"},
    "analysis": {"hf_softpick", "data", "modeling", "errors", "files", "versions"},
    "conversion": {"hf_softpick", "modeling", "errors", "files", "generation_settings", "versions"},
    "errors": set(),
    "files": {"errors"},
    "generation_settings": set(),
    "versions": set(),
    "commands": {"errors"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _layer(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] in ALLOWED else None


def _ours(path):
    """(layer, dotted name) of everything of ours that `path` imports, wherever in the file."""
    package = ("hf_softpick", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top == "hf_softpick":
                yield (rest[0] if rest else "hf_softpick"), name
            elif top in ("softpick_attention", "eval", "benchmarks", "tests"):
                yield top, name


def test_the_layers_are_there():
    assert {"modeling", "data", "training"} <= {_layer(path) for path in FILES}
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_read_downward(path):
    layer = _layer(path)
    for imported, name in _ours(path):
        if layer is None:
            assert imported not in ("eval", "benchmarks", "tests"), f"imports {name}"
        else:
            parts = name.removeprefix("hf_softpick.").split(".")
            names = {".".join(parts[:length]) for length in range(1, len(parts) + 1)} | {imported}
            assert imported == layer or names & ALLOWED[layer], f"{layer} must not import {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "modeling").rglob("*.py")), ids=lambda path: path.name)
def test_modeling_is_flat(path):
    """Hub custom code is copied from here: no folders, siblings only by `from .name import`, and nothing dotted."""
    assert path.parent == PACKAGE / "modeling"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and "." not in (node.module or ""), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            assert "hf_softpick" not in ast.unparse(node), ast.unparse(node)


def test_the_check_sees_a_violation(tmp_path, monkeypatch):
    """Relative and late imports count."""
    (tmp_path / "data").mkdir()
    wrong = tmp_path / "data" / "wrong.py"
    wrong.write_text("def f():\n    from ..training import trainer\n    import hf_softpick.modeling.normalizers\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert {layer for layer, _ in _ours(wrong)} == {"training", "modeling"}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_alone(path):
    """The Hub loads a kernel under a name of its own: siblings by `from .name import`, and nothing else of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] in {"torch", "triton"} | sys.stdlib_module_names, ast.unparse(node)


def test_the_kernel_folder_is_looked_at():
    assert {"__init__.py", "hub.py", "interface.py"} <= {path.name for path in KERNEL_FILES}


@pytest.mark.parametrize("path", sorted((PACKAGE / "modeling").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_are_optional_in_modeling(path):
    """Inside `try`, as transformers wants it of what a saved model may do without: triton exists on Linux only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import) and id(node) not in tried:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            tops = {(name or "").split(".")[0] for name in names}
            assert not tops & {"softpick_attention", "triton"}, ast.unparse(node)


def test_no_init_in_folders_that_are_not_packages():
    """kernels/__init__.py would shadow PyPI's kernels; eval and tests would be shipped."""
    root = PACKAGE.parent
    for name in ("kernels", "eval", "tests", "recipes", "benchmarks"):
        assert not (root / name / "__init__.py").exists()
