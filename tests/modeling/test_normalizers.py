"""The normalizers against loops over Python floats, and the invariants that all implementations inherit from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_softpick.modeling.attention_reference import attention_weights, rectified_softmax, softmax, softpick
from hf_softpick.modeling.normalizers import NORMALIZERS, SOFTPICK_EPS, base_normalizer

FUNCTIONS = {"softpick": softpick, "softmax": softmax, "rectified_softmax": rectified_softmax}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
quick = settings(max_examples=150, deadline=None, derandomize=True)
scores = st.floats(-1e4, 1e4, width=32)
rows = st.lists(scores, min_size=1, max_size=24)


def weights_by_loop(name: str, row: list[float], visible: list[bool] | None = None, eps: float = 1e-6) -> list[float]:
    """The formulas as they stand in the paper: no shift, Python floats, one key at a time. Good for |x| < 300."""
    visible = [True] * len(row) if visible is None else visible
    if name == "softpick":
        total = math.fsum(abs(math.expm1(x)) for x, seen in zip(row, visible, strict=True) if seen) + eps
        return [max(math.expm1(x), 0.0) / total if seen else 0.0 for x, seen in zip(row, visible, strict=True)]
    kept = [seen and (name == "softmax" or x >= 0) for x, seen in zip(row, visible, strict=True)]
    total = math.fsum(math.exp(x) for x, keep in zip(row, kept, strict=True) if keep)
    return [math.exp(x) / total if keep else 0.0 for x, keep in zip(row, kept, strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
@given(
    row=st.lists(st.tuples(st.floats(-200, 200), st.booleans()), min_size=1, max_size=20),
    masked=st.booleans(),
)
@quick
def test_float64_is_the_formula_of_the_paper(name, row, masked):
    """The stable form must not change the value, in particular not the place of eps."""
    values, visible = [x for x, _ in row], [seen for _, seen in row]
    mask = torch.tensor(visible) if masked else None
    expected = weights_by_loop(name, values, visible if masked else None)
    actual = FUNCTIONS[name](torch.tensor(values, dtype=torch.float64), mask=mask)
    # e^x - 1 as a difference keeps 1e-16 of 1, divided by eps where every score is tiny: 1e-10.
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=2e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_computed_in_float32_or_better_and_returned(name, dtype):
    x = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    actual = FUNCTIONS[name](x)
    expected = torch.tensor([weights_by_loop(name, row) for row in x.tolist()], dtype=torch.float64)
    assert actual.dtype == dtype and actual.shape == x.shape
    step = {torch.float64: 1e-14, torch.float32: 5e-7}.get(dtype, torch.finfo(dtype).eps / 2 * 1.01)
    assert_close(actual.double(), expected, rtol=0, atol=step)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_dim_names_the_keys(name, dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.rand(3, 4, 5) > 0.3
    moved = FUNCTIONS[name](x.movedim(dim, -1), mask=mask.movedim(dim, -1)).movedim(-1, dim)
    assert_close(FUNCTIONS[name](x, dim=dim, mask=mask), moved)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 1.0, 0.0])
@pytest.mark.parametrize("top", [1e-5, 0.1, 3.0, 40.0])
def test_eps_is_added_to_the_unshifted_denominator(eps, top):
    """The ancestor adds it after the shift, which is eps * e^max: 20 times too much at a score of 3."""
    row = [top, -0.5 * top, 0.25 * top]
    actual = softpick(torch.tensor(row, dtype=torch.float64), eps=eps)
    assert_close(actual.tolist(), weights_by_loop("softpick", row, eps=eps), rtol=1e-10, atol=0)
    assert SOFTPICK_EPS == 1e-6


def test_rows_of_tiny_scores_show_the_place_of_eps():
    """At 1e-5 a wrong eps changes the weights by percents: 1e-5 / (3e-5 + 1e-6)."""
    actual = softpick(torch.full((3,), 1e-5, dtype=torch.float64))
    assert_close(actual, torch.full((3,), 1 / 3.1, dtype=torch.float64), rtol=1e-4, atol=0)


def test_known_values():
    """By hand: e^x - 1 = 1, 3, -1/2 gives 1/4.5 and 3/4.5; softmax of the scores >= 0 is 2/6 and 4/6."""
    x = torch.tensor([math.log(2), math.log(4), math.log(0.5)], dtype=torch.float64)
    assert_close(softpick(x, eps=0.0), torch.tensor([1 / 4.5, 3 / 4.5, 0], dtype=torch.float64))
    assert_close(rectified_softmax(x), torch.tensor([1 / 3, 2 / 3, 0], dtype=torch.float64))
    assert_close(softmax(x), torch.tensor([2, 4, 0.5], dtype=torch.float64) / 6.5)
    assert_close(rectified_softmax(torch.tensor([0.0, -0.0, -1.0])), torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("name", FUNCTIONS)
@given(row=rows)
@quick
def test_weights_are_finite_and_sum_to_at_most_one(name, row):
    w = FUNCTIONS[name](torch.tensor(row))
    assert w.isfinite().all() and (w >= 0).all()
    assert w.double().sum() <= 1 + 1e-6
    if name == "softmax":
        assert w.double().sum() >= 1 - 1e-6


@given(row=rows)
@quick
def test_softpick_is_exactly_zero_where_the_score_is_not_positive(row):
    x = torch.tensor(row)
    assert (softpick(x)[x <= 0] == 0).all()
    assert (rectified_softmax(x)[x < 0] == 0).all()


@pytest.mark.parametrize("top", [0.0, 1e-3, 5.0, 60.0, 1e4])
def test_no_weight_is_negative_or_leaks_close_to_zero(top):
    """Many float32 values around 0 in rows of every maximum, where e^(x - m) and e^-m nearly cancel."""
    near = torch.logspace(-38, 1, 4001)
    x = torch.cat([-near, near[near <= top], torch.zeros(3), torch.tensor([top])])
    w = softpick(x)
    assert (w[x <= 0] == 0).all() and (w >= 0).all()


@given(row=rows, place=st.integers(0, 24), count=st.integers(1, 5))
@quick
def test_key_with_score_zero_changes_nothing(row, place, count):
    place = min(place, len(row))
    more = row[:place] + [0.0] * count + row[place:]
    w = softpick(torch.tensor(more, dtype=torch.float64)).tolist()
    assert w[place : place + count] == [0.0] * count
    assert_close(w[:place] + w[place + count :], softpick(torch.tensor(row, dtype=torch.float64)).tolist())


@pytest.mark.parametrize("name", FUNCTIONS)
@given(row=rows, hidden=st.lists(st.floats(width=32), min_size=1, max_size=5))
@quick
def test_masked_key_of_any_value_changes_nothing(name, row, hidden):
    """An additive mask would add e^-m per masked key to the denominator; softmax hides that, softpick does not."""
    mask = torch.tensor([True] * len(row) + [False] * len(hidden))
    w = FUNCTIONS[name](torch.tensor(row + hidden), mask=mask)
    assert (w[len(row) :] == 0).all()
    assert_close(w[: len(row)], FUNCTIONS[name](torch.tensor(row)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(row=rows, data=st.data())
@quick
def test_permuting_keys_permutes_the_weights(name, row, data):
    order = data.draw(st.permutations(range(len(row))))
    x = torch.tensor(row, dtype=torch.float64)
    assert_close(FUNCTIONS[name](x[list(order)]), FUNCTIONS[name](x)[list(order)])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@given(row=rows, place=st.integers(0, 24))
@quick
def test_visible_nan_and_inf_are_never_laundered(name, bad, row, place):
    x = torch.tensor(row + [0.0])
    x[min(place, len(row))] = bad
    assert FUNCTIONS[name](x).isnan().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_bad_row_leaves_the_others_alone(name):
    x = torch.randn(4, 9)
    clean = FUNCTIONS[name](x)
    x[2, 5] = float("nan")
    w = FUNCTIONS[name](x)
    assert w[2].isnan().all() and torch.equal(w[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_with_nothing_to_pick_are_zero_with_zero_gradient(name):
    """Fully masked for all; without a positive score for softpick; without one >= 0 for rectified softmax."""
    x = torch.tensor([[-1e4, -3.0, -1e-5], [0.0, 0.0, 0.0], [5.0, 1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([True, True, False])[:, None]
    w = FUNCTIONS[name](x, mask=mask)
    (gradient,) = torch.autograd.grad((w * torch.tensor([1.0, 2.0, 4.0])).sum(), x)
    zero = {"softpick": [0, 1, 2], "softmax": [2], "rectified_softmax": [0, 2]}[name]
    assert (w[zero] == 0).all() and (gradient[zero] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_agrees_with_finite_differences(name):
    x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    x = torch.where(x.abs() < 1e-2, 0.1, x).requires_grad_()
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(4)) > 0.2
    assert torch.autograd.gradcheck(lambda x: FUNCTIONS[name](x, mask=mask), x)
    assert torch.autograd.gradcheck(lambda x: FUNCTIONS[name](100 * x, mask=mask), x, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_broadcast_and_empty_slices_work(name):
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([True, False, True, True])
    assert torch.equal(FUNCTIONS[name](x, mask=mask), FUNCTIONS[name](x, mask=mask.expand(2, 3, 4)))
    assert FUNCTIONS[name](torch.empty(2, 0)).shape == (2, 0)
    assert FUNCTIONS[name](torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_masks_that_are_not_boolean_are_refused(name, dtype):
    """An additive mask of zeros and -inf would be taken for visible keys."""
    with pytest.raises(ValueError, match="mask has dtype .*expected torch.bool"):
        FUNCTIONS[name](torch.randn(3), mask=torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integer_scores_are_refused(name):
    """Weights in an integer dtype would all be cut to 0."""
    with pytest.raises(ValueError, match="expected a floating dtype"):
        FUNCTIONS[name](torch.tensor([1, 2, 3]))


def test_names():
    """scaled_* is the same function of scores that come scaled already."""
    x = torch.randn(2, 5)
    for name in NORMALIZERS:
        assert torch.equal(attention_weights(x, name), FUNCTIONS[base_normalizer(name)](x))
    assert base_normalizer("scaled_softpick") == "softpick" and base_normalizer("scaled_softmax") == "softmax"
    for unknown in ("scaled_rectified_softmax", "Softpick", ""):
        with pytest.raises(ValueError, match="expected one of softpick, softmax"):
            base_normalizer(unknown)
