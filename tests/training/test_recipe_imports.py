"""A recipe error must come at once: neither torch nor transformers may be imported for it.

Seconds are of the processor: other tests run beside these and would disturb a clock on the wall.
"""

import resource
import subprocess
import sys

CODE = """
import sys, time
start = time.process_time()
from hf_softpick.training.recipe import load_recipe
recipe = load_recipe(sys.argv[1])
seconds = time.process_time() - start
heavy = [name for name in ("torch", "transformers", "datasets", "numpy", "pyarrow") if name in sys.modules]
print(seconds, *heavy)
"""


def _seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_loading_is_light_and_fast(request):
    recipe = request.config.rootpath / "recipes" / "softpick_tiny.yaml"
    best = 60.0
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", CODE, recipe], capture_output=True, text=True, check=True)
        seconds, *heavy = found.stdout.split()
        assert heavy == []
        best = min(best, float(seconds))
    assert best < 1.0


def test_a_recipe_error_on_the_command_line(request, tmp_path):
    """Exit code 2, the message alone, in less than 2 seconds."""
    recipe = request.config.rootpath / "recipes" / "softpick_tiny.yaml"
    command = [sys.executable, "-m", "hf_softpick.train", recipe, "training.lerning_rate=1"]
    best = 60.0
    for _ in range(3):
        start = _seconds_of_children()
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        best = min(best, _seconds_of_children() - start)
        assert found.returncode == 2
        assert "did you mean training.learning_rate?" in found.stderr
        assert "Traceback" not in found.stderr
    assert best < 2.0
