"""The wheel: what is in it, what it needs, and that it works from outside the checkout."""

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels/softpick_attention/torch-ext/softpick_attention"

SKIP = shutil.ignore_patterns(".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__")
NAMES = ("softpick_attention", "hf_softpick")

# Import names whose distribution is called otherwise.
DISTRIBUTIONS = {"backports": "backports.zstd", "ruamel": "ruamel.yaml", "annotated_types": "annotated-types"}


def _requirements():
    """Names in setup.py: required ones, and those of extras."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS"):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    name = re.compile(r"^[A-Za-z0-9._-]+?(?=[<>=!~\[]|$)")
    required = {name.match(line).group() for line in found["REQUIRES"]}
    return required, {name.match(line).group() for lines in found["EXTRAS"].values() for line in lines}


def _pins():
    """The lines of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


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
    shutil.copytree(ROOT, folder / "source", ignore=SKIP)
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
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in inside if ".dist-info" not in name.split("/")[0]}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_softpick").rglob("*.py")}
    kernels = {path.relative_to(KERNELS.parent).as_posix() for path in KERNELS.rglob("*.py")}
    assert ours == package | kernels
    assert any(name.endswith("licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in inside)


def test_installed_package_works(installed):
    code = "import sys, hf_softpick; print(hf_softpick.__file__, hf_softpick.__version__, 'torch' in sys.modules)"
    found = installed("-c", code)
    assert found.returncode == 0, found.stderr
    file, version, torch_imported = found.stdout.split()
    assert file.startswith(str(installed.target))
    assert f"hf_softpick-{version}-" in found.stdout or re.fullmatch(r"\d+\.\d+\.\d+\w*", version)
    assert torch_imported == "False"


# Where Python finds the kernels once the package is imported, without importing them.
FIND = "import hf_softpick, importlib.util as u; print(u.find_spec('softpick_attention').origin, hf_softpick.__file__)"


def test_installed_kernels_are_those_of_the_wheel(installed):
    found = installed("-c", FIND)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(installed.target / name / "__init__.py") for name in NAMES]
    for path in KERNELS.glob("*.py"):
        assert (installed.target / "softpick_attention" / path.name).read_bytes() == path.read_bytes()


def test_installed_kernels_import(installed):
    found = installed("-c", "import softpick_attention as a; print(a.__file__, *a.__all__)")
    assert found.returncode == 0, found.stderr
    file, *names = found.stdout.split()
    assert file.startswith(str(installed.target))
    assert {"softpick_attn_func", "softpick_attn_varlen_func", "softpick_attn_with_kvcache"} <= set(names)


def test_kernels_without_triton(installed):
    """An ImportError that says so, the second time too: nothing half imported stays behind."""
    code = """
import sys
sys.modules["triton"] = None
for _ in range(2):
    try:
        import softpick_attention
    except ImportError as error:
        print(error)
"""
    found = installed("-c", code)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2 and all("needs triton" in line and "pip install" in line for line in lines)


def _outside_site(*arguments, cwd):
    """Runs Python with the installed libraries, but with nothing that an installation of ours left in its paths."""
    head = f"import sys; sys.path += {[sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]!r}; "
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", head + arguments[0], *arguments[1:]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_uninstalled_checkout_finds_its_kernels(installed, tmp_path):
    """From the repository root, and not those of another version that happens to be installed."""
    code = f"sys.path.append({str(installed.target)!r}); {FIND}"
    found = _outside_site(code, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(KERNELS / "__init__.py"), str(ROOT / "hf_softpick/__init__.py")]
    assert _outside_site(FIND, cwd=tmp_path).returncode != 0, "the check sees an installation"


def test_editable_install_finds_the_kernels_of_the_checkout(tmp_path):
    """Of an editable wheel, laid into a folder of its own; imported before the package, from elsewhere."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT, source, ignore=SKIP)
    code = "from setuptools import build_meta as b; import sys; print(b.build_editable(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path]
    built = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).extractall(target)
    code = "import importlib.util as u, site, sys; sys.path.insert(0, sys.argv[1]); site.addsitedir(sys.argv[1]); "
    code += f"print(*(u.find_spec(name).origin for name in {NAMES}))"
    found = _outside_site(code, target, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    inside = source / KERNELS.relative_to(ROOT)
    assert found.stdout.split() == [str(inside / "__init__.py"), str(source / "hf_softpick/__init__.py")]


def test_public_names_of_the_installed_package(installed):
    """On a machine without triton, which exists on Linux only."""
    code = "import sys; sys.modules['triton'] = None; import hf_softpick as h; "
    code += "print(h.SoftpickConfig().model_type, h.softpick.__name__, h.SoftpickForCausalLM)"
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
        # compression is in the standard library from Python 3.14 on.
        if name in sys.stdlib_module_names or name in ("hf_softpick", "softpick_attention", "compression"):
            continue
        distribution = DISTRIBUTIONS.get(name, name)
        assert distribution in required | extras, f"{path.name} imports {name}, which setup.py does not name"


def test_pins_cover_what_is_required_and_lie_in_its_ranges():
    pins = {pin.name: str(pin.specifier).removeprefix("==") for pin in _pins()}
    assert all(re.fullmatch(r"[0-9][\w.]*", version) for version in pins.values())
    source = ast.parse((ROOT / "setup.py").read_text())
    values = {n.targets[0].id: n.value for n in source.body if isinstance(n, ast.Assign)}
    ranges = ast.literal_eval(values["REQUIRES"])
    extras = ast.literal_eval(values["EXTRAS"])
    assert {"gpu", "eval", "deepspeed", "wandb", "dev"} <= extras.keys()
    for extra, lines in extras.items():
        ranges += lines if extra not in ("flash", "gptq") else []  # need a GPU to compile, so no pin is tested
    for requirement in map(Requirement, ranges):
        assert requirement.name in pins, f"requirements.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[requirement.name])


def test_environment_has_the_pins():
    """The suite says something about the pinned versions only if they are what runs."""
    from importlib.metadata import version

    for pin in _pins():
        if pin.marker is None or pin.marker.evaluate():
            assert str(pin.specifier) == f"=={version(pin.name).split('+')[0]}", pin.name
