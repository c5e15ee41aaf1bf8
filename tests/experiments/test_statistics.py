import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments import ntt_report
from experiments.statistics import holm, paired, spread

# Spread


def test_spread_by_hand():
    # Deviations -1, -1, 2 from 3: their squares sum to 6, over n - 1 = 2.
    assert spread(np.array([2.0, 2.0, 5.0])) == {
        "mean": 3.0, "std": pytest.approx(3**0.5), "values": [2.0, 2.0, 5.0],
    }  # fmt: skip
    assert spread(np.array([4])) == {"mean": 4.0, "std": None, "values": [4.0]}
    assert ntt_report.spread is spread


# Paired comparison


def test_paired_by_hand():
    # Differences 1, 2, 3, 2: mean 2, squared deviations sum to 2 over 3, standard error
    # sqrt(2 / 3) / 2. Tables give t = 3.182446 at 97.5 % and 3 degrees of freedom.
    result = paired([2.0, 4.0, 6.0, 6.0], [1.0, 2.0, 3.0, 4.0])
    error = (2 / 3) ** 0.5 / 2
    assert result["mean"] == 2.0
    assert result["std"] == pytest.approx((2 / 3) ** 0.5)
    assert result["low"] == pytest.approx(2 - 3.182446 * error, abs=1e-6)
    assert result["high"] == pytest.approx(2 + 3.182446 * error, abs=1e-6)
    assert result["n"] == 4


def test_the_p_value_by_hand():
    # With one degree of freedom t is a Cauchy variable: p = 1 - 2 atan(t) / pi. Differences 1
    # and 3 have mean 2 and standard error 1.
    result = paired([1.0, 3.0], [0.0, 0.0])
    assert result["p_value"] == pytest.approx(1 - 2 * np.arctan(2.0) / np.pi, rel=1e-12)
    # And p is 5 % where the interval of 95 % ends at zero: t = tan(0.475 pi).
    assert result["high"] == pytest.approx(2 + np.tan(0.475 * np.pi), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.95, 0.99]))
def test_paired_agrees_with_scipy(n, seed, confidence):
    values, baseline = np.random.default_rng(seed).normal(size=(2, n))
    expected = stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(confidence)
    result = paired(values, baseline, confidence)
    assert result == {
        "mean": pytest.approx(np.mean(values - baseline), rel=1e-12),
        "std": pytest.approx(np.std(values - baseline, ddof=1), rel=1e-12),
        "low": pytest.approx(interval.low, rel=1e-9, abs=1e-12),
        "high": pytest.approx(interval.high, rel=1e-9, abs=1e-12),
        "p_value": pytest.approx(expected.pvalue, rel=1e-9),
        "n": n,
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_order_of_the_methods_is_a_sign():
    a, b = [0.91, 0.93, 0.90], [0.90, 0.90, 0.92]
    there, back = paired(a, b), paired(b, a)
    assert (there["mean"], there["low"]) == (-back["mean"], -back["high"])
    assert there["p_value"] == back["p_value"]


def test_one_pair_has_a_mean_only():
    assert paired([0.75], [0.5]) == {
        "mean": 0.25, "std": None, "low": None, "high": None, "p_value": None, "n": 1,
    }  # fmt: skip


@pytest.mark.parametrize("difference", [0.0, 0.1, -0.1])
def test_equal_differences_are_no_test(difference):
    """Three seeds that each lose one image say nothing of their spread."""
    # Three times 0.1 has a mean that is not 0.1.
    mean = pytest.approx(difference, rel=1e-15)
    result = paired([difference] * 3, [0.0] * 3)
    expected = {"mean": mean, "std": 0.0, "low": None, "high": None, "p_value": None, "n": 3}
    assert result == expected
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_differences_that_are_equal_but_for_rounding(dtype):
    """Accuracies of 360 images, one less each, in the precision of a metrics file."""
    values, baseline = np.array([341, 333, 350]) / 360, np.array([342, 334, 351]) / 360
    result = paired(values.astype(dtype), baseline.astype(dtype))
    assert result["p_value"] is None and result["low"] is None
    assert result["mean"] == pytest.approx(-1 / 360, rel=1e-4)
    # One image more in one seed is a difference.
    other = values + np.array([0, 0, 1 / 360])
    assert paired(other.astype(dtype), baseline)["p_value"] is not None


@pytest.mark.parametrize(
    ("values", "baseline", "message"),
    [
        ([1.0, 2.0], [1.0], r"shapes \(2,\) and \(1,\), expected \(n,\)"),
        ([[1.0, 2.0]], [[1.0, 3.0]], r"shapes \(1, 2\) and \(1, 2\), expected \(n,\)"),
        ([], [], "are empty"),
        ([1.0, float("nan")], [1.0, 2.0], r"values are \[1.0, nan\], expected finite"),
        ([1.0, 2.0], [float("inf"), 2.0], r"baseline are \[inf, 2.0\], expected finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(values, baseline, message):
    with pytest.raises(ValueError, match=message):
        paired(values, baseline)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
def test_confidence_is_a_fraction(confidence):
    with pytest.raises(ValueError, match="expected a fraction in"):
        paired([1.0, 2.0], [0.0, 0.0], confidence)


# Holm


def test_holm_worked_example():
    # 0.005 * 4 = 0.02, 0.01 * 3 = 0.03, 0.03 * 2 = 0.06, and 0.04 * 1 is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_passes_none_through_and_counts_the_rest():
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]
    assert holm([None]) == [None]
    assert holm([]) == []


def test_holm_stays_a_probability():
    assert holm([0.9, 0.6, 0.7]) == [1.0, 1.0, 1.0]
    assert holm([0.0, 1.0]) == [0.0, 1.0]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    rejected = set()
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if (len(p_values) - rank) * p_values[index] > alpha:
            break
        rejected.add(int(index))
    corrected = holm(p_values)
    assert {i for i, p in enumerate(corrected) if p <= alpha} == rejected
    assert json.loads(json.dumps(corrected)) == corrected


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"p-value 1 is .*, expected a probability"):
        holm([0.5, p, None, 0.1])
