"""Forward, backward and log denominators against the float64 formula: shapes, dtypes, masks, layouts, launches."""

import itertools

import pytest
import torch
from kernel_cases import VALUES, Case, check_case, covering, inputs, pairs_of, visibility
from kernel_memory import every_second, guarded, place

from softpick_attention import launch
from softpick_attention.tuning import Target

SMALL, LARGE = 72, 300  # cost of the largest case of a change, and of the sweep


@pytest.fixture
def device_of(monkeypatch):
    """Let the launchers believe in a device with so many processors, and with room for one head in its cache."""

    def believe(processors: int) -> None:
        monkeypatch.setattr(launch, "current_target", lambda device: Target("interpreter", processors))
        monkeypatch.setattr(launch, "_CACHE_BYTES", 1 if processors > 1 else 30_000)

    return believe


def agrees(case: Case, monkeypatch, device_of) -> None:
    device_of(case.processors)
    with guarded(monkeypatch):
        visible, mask = visibility(case)
        given = {name: x for name, x in visible._asdict().items() if isinstance(x, torch.Tensor)}
        if case.layout == "gaps":
            # Between hidden keys lie visible ones, and the other way round.
            given = {name: every_second(x, ~x) for name, x in given.items()}
        else:
            layout = {"offset": "gaps"}.get(case.layout, case.layout)
            given = {name: place(x, layout if x.ndim == 4 else "dense") for name, x in given.items()}
        check_case(case, *(place(x, case.layout) for x in inputs(case)), visible._replace(**given), mask)


@pytest.mark.parametrize("case", covering(60, SMALL), ids=lambda case: case.id)
def test_is_the_formula(case, monkeypatch, device_of):
    agrees(case, monkeypatch, device_of)


def pytest_generate_tests(metafunc):
    """The search for the cases of the sweep takes seconds, and is left out where they do not run."""
    if metafunc.function is not test_is_the_formula_for_every_pair_of_choices:
        return
    cases = ()
    if "sweep" in metafunc.config.option.markexpr:
        longest = VALUES._replace(length=(1023,), extra=(0, 1), batch=(1,), heads=((1, 1), (2, 1)), config=((64, 64),))
        cases = covering(None, LARGE, seed=1) + covering(12, 10_000, longest)
    metafunc.parametrize("case", cases, ids=lambda case: case.id)


@pytest.mark.sweep
def test_is_the_formula_for_every_pair_of_choices(case, monkeypatch, device_of):
    agrees(case, monkeypatch, device_of)


def test_the_cases_cover_what_they_should():
    """Every choice often, every pair of the shorter lists, most pairs of all; the sweep finds the rest."""
    cases = covering(60, SMALL)
    found = set().union(*map(pairs_of, cases))
    count = 0
    for (one, ones), (two, twos) in itertools.combinations(VALUES._asdict().items(), 2):
        pairs = {((one, x), (two, y)) for x in ones for y in twos}
        count += len(pairs)
        if len(pairs) <= 16:
            assert pairs <= found, f"{one} and {two}: {pairs - found} are never together"
    assert len(found) > 0.75 * count
    for field, values in VALUES._asdict().items():
        for value in values:
            assert sum(getattr(case, field) == value for case in cases) >= 2, f"{field} {value} is rare"
