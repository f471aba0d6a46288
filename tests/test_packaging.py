"""The wheel: what is in it, what it needs, and that it works from outside the checkout."""

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Import names whose distribution is called otherwise.
DISTRIBUTIONS = {"ruamel": "ruamel.yaml", "annotated_types": "annotated-types"}


def _requirements():
    """Names in setup.py: required ones, and those of extras."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS"):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    name = re.compile(r"^[A-Za-z0-9._-]+?(?=[<>=!~\[]|$)")
    required = {name.match(line).group() for line in found["REQUIRES"]}
    return required, {name.match(line).group() for lines in found["EXTRAS"].values() for line in lines}


def _imported(folder):
    """Top-level names of absolute imports, with a file that has them."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.split(".")[0], path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout gets no build folder; without the network."""
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", folder, folder / "source"], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python where only the installed wheel can be the package."""
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    outside = tmp_path_factory.mktemp("outside")

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(target)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=outside, env=environment, capture_output=True, text=True, timeout=120
        )

    run.target = target
    return run


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    tops = {name.parts[0] for name in names if ".dist-info" not in name.parts[0]}
    assert tops <= {"hf_softpick", "softpick_attention"}
    inside = {name.as_posix() for name in names}
    missing = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_softpick").rglob("*.py")} - inside
    assert missing == set()
    assert any(name.endswith("licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in inside)


def test_installed_package_works(installed):
    code = "import sys, hf_softpick; print(hf_softpick.__file__, hf_softpick.__version__, 'torch' in sys.modules)"
    found = installed("-c", code)
    assert found.returncode == 0, found.stderr
    file, version, torch_imported = found.stdout.split()
    assert file.startswith(str(installed.target))
    assert f"hf_softpick-{version}-" in found.stdout or re.fullmatch(r"\d+\.\d+\.\d+\w*", version)
    assert torch_imported == "False"


def test_public_names_of_the_installed_package(installed):
    code = "import hf_softpick as h; print(h.SoftpickConfig().model_type, h.softpick.__name__, h.SoftpickForCausalLM)"
    found = installed("-c", code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("softpick softpick ")


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_help_is_quick_from_outside(installed, command):
    best = 60.0
    for _ in range(3):
        # Of the processor: other tests run beside this one.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = installed("-m", f"hf_softpick.{command}", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert found.returncode == 0, found.stderr
        assert "recipe" in found.stdout.lower()
    assert best < 2.0


def test_version_is_in_one_place(wheel):
    version = re.search(r'__version__ = "(.+)"', (ROOT / "hf_softpick/__init__.py").read_text()).group(1)
    assert wheel.name.startswith(f"hf_softpick-{version}-")


def test_imports_are_declared():
    required, extras = _requirements()
    for name, path in _imported(ROOT / "hf_softpick"):
        if name in sys.stdlib_module_names or name in ("hf_softpick", "softpick_attention"):
            continue
        distribution = DISTRIBUTIONS.get(name, name)
        assert distribution in required | extras, f"{path.name} imports {name}, which setup.py does not name"


def test_pins_cover_what_is_required_and_lie_in_its_ranges():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][\w.]*)", line).groups()
            pins[name] = version
    source = ast.parse((ROOT / "setup.py").read_text())
    values = {n.targets[0].id: n.value for n in source.body if isinstance(n, ast.Assign)}
    ranges = ast.literal_eval(values["REQUIRES"])
    extras = ast.literal_eval(values["EXTRAS"])
    assert {"gpu", "eval", "deepspeed", "wandb", "dev"} <= extras.keys()
    for extra, lines in extras.items():
        ranges += lines if extra != "gpu" else []
    for requirement in map(Requirement, ranges):
        assert requirement.name in pins, f"requirements.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name])


def test_environment_has_the_pins():
    """The suite says something about the pinned versions only if they are what runs."""
    from importlib.metadata import version

    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, pinned = line.split("==")
            assert version(name).split("+")[0] == pinned
