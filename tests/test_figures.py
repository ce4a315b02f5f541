import numpy as np
import pytest

from parrot_edge.figures import RESAMPLES, Resampling, average, readable

GROUPS = {"a": [f"g{number}" for number in range(40)], "b": ["one", "two", "three"]}
MEMBERS = [("a", name) for name in GROUPS["a"]]


def test_the_first_value_is_what_the_data_say_and_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(5, 2, size=40).tolist()
    figure = Resampling(GROUPS).mean(MEMBERS, values)
    assert figure.shape == (1 + RESAMPLES,)
    assert figure[0] == pytest.approx(np.mean(values))
    error = np.std(values) / np.sqrt(40)
    report = readable({"mean": figure})["mean"]
    assert report["high"] - report["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert report["low"] < np.mean(values) < report["high"]


def test_measurements_of_one_dialogue_are_drawn_together():
    wide = Resampling(GROUPS).mean(MEMBERS, range(40))
    repeated = Resampling(GROUPS).mean(MEMBERS * 10, [*range(40)] * 10)
    assert np.allclose(wide, repeated)


def test_figures_of_one_resampling_are_paired():
    resampling, values = Resampling(GROUPS), np.arange(40.0)
    difference = resampling.mean(MEMBERS, values + 1) - resampling.mean(MEMBERS, values)
    assert np.allclose(difference, 1)


def test_a_source_keeps_its_size_in_every_resample():
    members = [*MEMBERS, ("b", "one"), ("b", "two"), ("b", "three")]
    counted = Resampling(GROUPS).ratio(members, [0] * 40 + [1] * 3, [1] * 40 + [0] * 3)
    assert np.allclose(counted, 3 / 40)


@pytest.mark.parametrize("values", [[3, 1, 2], [4, 1, 3, 2], [7]])
def test_the_median_is_the_lower_one_of_two(values):
    resampling, members = Resampling.of(len(values))
    assert resampling.median(members, values)[0] == sorted(values)[(len(values) - 1) // 2]


def test_auc_is_the_share_of_pairs_in_order():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(2)
    high, low = random.integers(0, 9, 30) + 2, random.integers(0, 9, 25)  # with ties
    resampling = Resampling(GROUPS)
    figure = resampling.auc((MEMBERS[:30], high), (MEMBERS[:25], low))
    assert figure[0] == pytest.approx(roc_auc_score([1] * 30 + [0] * 25, [*high, *low]))
    assert np.all((figure >= 0) & (figure <= 1))


def test_a_share_without_a_case_has_the_upper_limit_that_the_dialogues_allow():
    resampling, members = Resampling.of(200)
    report = readable(resampling.share(members * 3, [False] * 600))
    assert report["value"] == report["low"] - report["low"] == 0
    assert report["high"] == pytest.approx(1 - 0.025 ** (1 / 200), rel=0.01)
    everything = readable(resampling.share(members, [True] * 200))
    assert everything["high"] == 1
    assert everything["low"] == pytest.approx(0.025 ** (1 / 200), rel=0.01)


def test_what_cannot_be_measured_is_none_and_left_out_of_an_average():
    resampling = Resampling(GROUPS)
    nothing, something = resampling.mean([], []), resampling.mean(MEMBERS, range(40))
    assert readable({"figures": [nothing]}) == {"figures": [None]}
    assert readable(resampling.median([], [])) is None
    assert readable(resampling.share([], [])) is None
    assert np.allclose(average([nothing, something]), something)
    assert readable(average([nothing])) is None
    assert readable(resampling.auc(([], []), (MEMBERS, range(40)))) is None
