"""Moments and extremes of one tensor: massive activations with their places, and what is left out."""

import pytest
import torch
from dense_statistics import activations

from hf_softpick.analysis.activation_statistics import ActivationStatistics


def _tensor(scale=0.1):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(2, 50, 32, generator=generator, dtype=torch.float64)


def test_massive_activations_and_their_places():
    """Above 100 and above 1000 medians, which are about 0.07 here; the largest first."""
    x = _tensor()
    x[0, 3, 5], x[1, 7, 2], x[1, 7, 9], x[1, 20, 0] = 99.0, 500.0, -2000.0, 101.0
    statistics = ActivationStatistics()
    statistics.add(x)
    result = statistics.result()
    for name, value in activations(list(x)).items():
        assert result[name] == pytest.approx(value, rel=1e-9), name
    assert result["massive"] == 3
    places = [tuple(place[name] for name in ("row", "position", "channel", "value")) for place in result["massive_at"]]
    assert places == [(1, 7, 9, -2000.0), (1, 7, 2, 500.0), (1, 20, 0, 101.0)]
    assert result["largest"] == result["massive_at"][0]


def test_large_is_not_massive_where_everything_is_large():
    x = _tensor(scale=10.0)
    x[0, 3, 5] = 500.0  # 75 medians
    statistics = ActivationStatistics()
    statistics.add(x)
    assert statistics.result()["massive"] == 0 and statistics.result()["largest"]["value"] == 500.0


def test_padding_is_left_out_and_places_count_it():
    x, real = _tensor(), torch.ones(2, 50, dtype=torch.bool)
    real[1, :10] = False
    x[1, :10] = float("nan")
    x[1, 12, 4] = 300.0
    statistics = ActivationStatistics()
    statistics.add(x, real, first_row=6)
    result = statistics.result()
    for name, value in activations([x[0], x[1, 10:]]).items():
        assert result[name] == pytest.approx(value, rel=1e-9), name
    assert statistics.nonfinite == 0
    assert result["massive_at"] == [{"row": 7, "position": 12, "channel": 4, "value": 300.0}]


def test_a_million_values_in_bfloat16_keep_their_digits():
    """Computed in float32, summed in float64, whatever the model computes in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 1024, generator=generator).bfloat16()
    statistics = ActivationStatistics()
    for row in range(4):
        statistics.add(x[row : row + 1])
    expected = activations(list(x.double()))
    for name, value in statistics.result().items():
        if name in expected:
            assert value == pytest.approx(expected[name], rel=1e-5), name


def test_constants_and_nothing():
    statistics = ActivationStatistics()
    with pytest.raises(ValueError, match="no token"):
        statistics.result()
    statistics.add(torch.full((1, 3, 4), 2.0))
    result = statistics.result()
    assert result["kurtosis"] != result["kurtosis"]  # a constant has none
    assert (result["max"], result["min"], result["median"], result["top3"]) == (2.0, 2.0, 2.0, [2.0, 2.0, 2.0])


@pytest.mark.parametrize(("offset", "scale"), [(1000.0, 1.0), (5.0, 0.01), (0.0, 1e12), (0.0, 1e-12)])
def test_float32_neither_cancels_nor_overflows(offset, scale):
    """A mean far above the deviation, and values whose fourth power float32 cannot hold."""
    x = (_tensor(scale) + offset).float()
    statistics = ActivationStatistics()
    for row in range(2):
        statistics.add(x[row : row + 1])
    expected = activations(list(x.double()))
    assert statistics.result()["kurtosis"] == pytest.approx(expected["kurtosis"], rel=1e-3)
    assert statistics.result()["token_kurtosis"] == pytest.approx(expected["token_kurtosis"], rel=1e-3)
    assert statistics.nonfinite == 0


def test_constant_tokens_do_not_spoil_the_mean_over_tokens():
    """Softpick attention gives exactly 0 where no row of any head has mass."""
    x = _tensor()
    x[0, 0], x[1, 4] = 0.0, 7.1
    statistics = ActivationStatistics()
    statistics.add(x.float())
    uneven = [torch.cat([x[0, 1:]]), torch.cat([x[1, :4], x[1, 5:]])]
    assert statistics.result()["token_kurtosis"] == pytest.approx(activations(uneven)["token_kurtosis"], rel=1e-4)
    x[0, 3, 1] = float("nan")
    statistics.add(x.float())
    result = statistics.result()
    assert result["token_kurtosis"] != result["token_kurtosis"] and result["kurtosis"] != result["kurtosis"]


def test_merged_is_the_same_as_added():
    x = _tensor()
    whole, first, second = (ActivationStatistics() for _ in range(3))
    whole.add(x)
    first.add(x[:1])
    second.add(x[1:], first_row=1)
    first.merge(second)
    merged, expected = first.result(), whole.result()
    assert merged.pop("kurtosis") == pytest.approx(expected.pop("kurtosis"), rel=1e-12)
    assert merged == expected


def test_unequal_parts_merge_into_the_whole():
    """Of different sizes, means, spreads and skews, so that every term of the pairwise formulas counts."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 0.5, 0.0), (7, 1.5, 30.0), (21, 0.1, -20.0))
    parts = [(spread * torch.randn(n, 32, generator=generator).double()).exp() + mean for n, spread, mean in shapes]
    parts[0][3, 5], parts[1][2, 1], parts[1][6, 0], parts[2][9, 9] = -5e3, 9e4, -8e4, 4e4
    added = [ActivationStatistics() for _ in range(3)]
    for row, (statistics, part) in enumerate(zip(added, parts, strict=True)):
        statistics.add(part[None], first_row=row)
    alone = [statistics.result() for statistics in added]
    added[1].merge(added[2])
    added[0].merge(added[1])
    merged = added[0].result()
    for name, value in activations(parts).items():
        assert merged[name] == pytest.approx(value, rel=1e-9), name
    places = [place for one in alone for place in one["massive_at"]]
    assert merged["massive_at"] == sorted(places, key=lambda place: -abs(place["value"])) and len(places) == 4
    assert merged["largest"]["row"] == 1


def test_numbers_that_are_none_are_counted():
    x = _tensor()
    x[0, 1, 2], x[0, 3, 4], x[1, 0, 0], x[1, 49, 31] = (float(word) for word in ("nan", "inf", "-inf", "nan"))
    statistics, other = ActivationStatistics(), ActivationStatistics()
    statistics.add(x)
    assert statistics.nonfinite == 4
    other.add(x[1:])
    statistics.merge(other)
    assert statistics.nonfinite == 6
