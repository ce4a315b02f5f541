"""The measures of dialect identification, on cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from parrot_edge.dialect.scoring import (
    Scores,
    accuracy,
    cavg,
    confusion,
    det_points,
    detection_ratios,
    eer,
    gather,
    measure,
    min_cavg,
    min_dcf,
    resample_speakers,
)
from parrot_edge.errors import UsageError

CLOSED = Scores(
    ("a", "b", "c"),
    np.array(
        [
            [0.9, 0.1, 0.2],  # of a
            [0.4, 0.6, 0.1],  # of a
            [0.3, 0.8, 0.5],  # of b
            [0.2, 0.1, 1.0],  # of c
            [0.7, 0.0, 0.5],  # of c
        ]
    ),
    np.array([0, 0, 1, 2, 2]),
    ("s1", "s2", "s3", "s4", "s5"),
)
OPEN = Scores(
    CLOSED.labels,
    np.concatenate([CLOSED.matrix, [[0.6, 0.2, 0.1], [0.1, 0.1, 0.3]]]),
    np.array([0, 0, 1, 2, 2, -1, -1]),
    (*CLOSED.speakers, "s6", "s7"),
)


def test_cavg_of_a_closed_set_is_the_mean_over_labels() -> None:
    # threshold 0.5; a: misses 1/2, takes 0/1 of b and 1/2 of c: 0.5/2 + 0.25 * 1/2 = 0.375
    # b: misses 0, takes 1/2 of a, 0 of c: 0.125.  c: misses 0, takes 0/2 of a and 1/1 of b: 0.25
    assert cavg(CLOSED, 0.5) == pytest.approx((0.375 + 0.125 + 0.25) / 3)


def test_cavg_of_an_open_set_takes_the_unknown_as_one_more_class() -> None:
    # the other classes weigh 0.5/3 each; a takes 1/2 of the unknown, b and c none of them
    a = 0.25 + (0.5 / 3) * (1 / 2 + 1 / 2)
    b = (0.5 / 3) * (1 / 2)
    c = (0.5 / 3) * 1
    assert cavg(OPEN, 0.5) == pytest.approx((a + b + c) / 3)


def test_score_at_the_threshold_is_accepted() -> None:
    two = Scores(("a", "b"), np.array([[0.5, 0.0], [0.5, 1.0]]), np.array([0, 1]), ("x", "y"))
    assert cavg(two, 0.5) == pytest.approx(0.25)  # a is not missed, and takes the utterance of b
    assert cavg(two, 0.500001) == pytest.approx(0.25)  # a is missed, and takes none


def test_min_cavg_is_the_least_over_21_even_thresholds() -> None:
    thresholds = [0.0 + step * 1.0 / 20 for step in range(21)]
    assert min_cavg(CLOSED) == pytest.approx(min(float(cavg(CLOSED, each)[0]) for each in thresholds))
    # a threshold between two of the grid separates these, which the challenge's grid does not find
    narrow = Scores(
        ("a", "b"), np.array([[0.52, 0.0], [0.51, 1.0], [0.0, 1.0]]), np.array([0, 1, 1]), ("x", "y", "z")
    )
    assert cavg(narrow, 0.515) == pytest.approx(0)
    assert min_cavg(narrow)[0] > 0


def test_label_without_utterances_has_no_errors() -> None:
    one = Scores(("a", "b"), np.array([[0.9, 0.6]]), np.array([0]), ("x",))
    assert cavg(one, 0.5) == pytest.approx(0.25)  # b: no misses counted, takes all of a; a: none


def kaldi_eer(targets: list[float], others: list[float]) -> float:
    """Positions in the sorted lists, one by one, as `compute-eer` is documented to go through them."""
    targets, others = sorted(targets), sorted(others)
    place = 0
    while place + 1 < len(targets):
        against = max(0, len(others) - 1 - len(others) * place // len(targets))
        if others[against] < targets[place]:
            break
        place += 1
    return place / len(targets)


def test_eer_is_that_of_two_sorted_lists() -> None:
    # targets .4 .5 .8 .9 1.0; others .0 .1 .1 .1 .2 .2 .3 .5 .6 .7
    # at .4: 0 missed, 3/10 accepted; at .5: 1/5 missed, 3/10; at .8: 2/5 missed, none accepted
    assert eer(CLOSED) == pytest.approx(2 / 5)
    values, is_target, _ = CLOSED.trials()
    assert kaldi_eer(list(values[is_target]), list(values[~is_target])) == 2 / 5


@pytest.mark.parametrize("seed", range(20))
def test_eer_is_that_of_the_lists_with_ties_and_weights(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(3, 40))
    truth = random.integers(-1, 3, size=count)
    truth[0] = 0
    matrix = random.integers(0, 8, size=(count, 3)) + 3.0 * (truth[:, None] == np.arange(3))
    scores = Scores(("a", "b", "c"), matrix, truth, tuple(map(str, range(count))))
    weights = np.stack([np.ones(count), random.integers(0, 4, size=count)]).astype(float)
    weights[:, 0] = 1
    for row, found in zip(weights, eer(scores, weights), strict=True):
        again = scores.take(np.repeat(np.arange(count), row.astype(int)))
        values, is_target, _ = again.trials()
        assert found == pytest.approx(kaldi_eer(list(values[is_target]), list(values[~is_target])))


def test_weights_count_an_utterance_as_if_it_stood_more_often() -> None:
    weights = np.array([[2.0, 1, 0, 3, 1]])
    again = CLOSED.take(np.repeat(np.arange(5), [2, 1, 0, 3, 1]))
    assert cavg(CLOSED, 0.5, weights) == pytest.approx(cavg(again, 0.5))
    assert accuracy(CLOSED, weights) == pytest.approx(accuracy(again))
    assert min_dcf(CLOSED, weights) == pytest.approx(min_dcf(again))


def test_min_dcf_is_one_where_nothing_is_known() -> None:
    flat = Scores(("a", "b"), np.zeros((4, 2)), np.array([0, 0, 1, 1]), tuple("wxyz"))
    assert min_dcf(flat) == pytest.approx(1)
    sure = Scores(("a", "b"), np.array([[1.0, 0], [0, 1]]), np.array([0, 1]), ("x", "y"))
    assert min_dcf(sure) == pytest.approx(0)
    # refusing a target of five costs a fifth; a tenth of the others accepted would cost 99 * 3/10
    assert min_dcf(CLOSED) == pytest.approx(2 / 5)


def test_accuracy_and_confusion_count_the_highest_score() -> None:
    assert accuracy(CLOSED) == pytest.approx(3 / 5)
    assert confusion(CLOSED).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert confusion(OPEN).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1], [1, 0, 1]]
    assert accuracy(OPEN) == accuracy(CLOSED)  # of the unknown none can be right


def test_det_curve_runs_from_all_accepted_to_none() -> None:
    fa, miss = det_points(CLOSED)
    assert (fa[0], miss[0]) == (1, 0)
    assert (fa[-1], miss[-1]) == (0, 1)
    assert (np.diff(fa) <= 0).all()
    assert (np.diff(miss) >= 0).all()
    assert (pytest.approx(0.3), pytest.approx(0)) in list(zip(fa, miss, strict=True))


def test_detection_ratio_is_zero_where_nothing_speaks_for_a_label() -> None:
    assert detection_ratios(np.array([[3.0, 3.0, 3.0]])) == pytest.approx(0)
    far = detection_ratios(np.array([[0.0, -2000.0]]))
    assert np.isfinite(far).all()


def test_resamples_keep_the_speakers_of_a_label_together() -> None:
    scores = Scores(
        ("a", "b"), np.zeros((6, 2)), np.array([0, 0, 0, 1, 1, -1]), ("x", "x", "y", "z", "w", "v")
    )
    weights = resample_speakers(scores)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 0] + weights[:, 2] == 2).all()
    assert (weights[:, 3] + weights[:, 4] == 2).all()
    assert (weights[:, 5] == 1).all()


def test_report_has_every_measure_with_its_interval() -> None:
    report = measure(OPEN, 5 * OPEN.matrix)
    assert report["set"] == "open"
    assert report["accuracy"]["value"] == 0.6
    for name in ("eer", "cavg", "min_cavg", "min_dcf"):
        assert 0 <= report[name]["low"] <= report[name]["value"] <= report[name]["high"] <= 1
    assert report["labels_of_one_speaker"] == ["b"]
    assert report["confusion"]["unknown"] == [1, 0, 1]


def test_labels_not_known_to_the_system_are_unknown() -> None:
    scores = gather(["a", "b"], [[1, 0], [0, 1]], ["b", "klingon"], ["x", "y"])
    assert scores.truth.tolist() == [1, -1]
    assert scores.is_open
    assert not scores.known().is_open


@pytest.mark.parametrize(
    ("labels", "matrix", "said"),
    [
        (("a",), [[1.0]], "only one label"),
        (("a", "b"), [[1.0]], "scores are"),
        (("a", "b"), [[1.0, float("nan")]], "finite"),
    ],
)
def test_scores_that_mean_nothing_are_refused(labels: tuple[str, ...], matrix: list, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Scores(labels, np.array(matrix), np.array([0]), ("x",))
