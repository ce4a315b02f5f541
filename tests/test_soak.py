"""A few minutes of the soak; `python tests/soak.py OUT` runs its two hours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from soak import MOST_GROWTH, measure, soak


@pytest.mark.soak
def test_nothing_grows_and_nothing_is_lost_while_everything_goes_wrong(tmp_path: Path) -> None:
    minutes = float(os.environ.get("SOAK_MINUTES", "4.5"))
    few = minutes < 30  # in which the memory is not yet warm, so that only a leak is told
    report = soak(
        tmp_path / "soak", minutes, warm_up=min(10.0, minutes / 2), most_growth=0.2 if few else MOST_GROWTH
    )
    assert report["complaints"] == []
    runs = report["runs"]
    assert {"kill", "full disk"} <= set(runs["killed"]["faults"])
    assert set(runs["steady"]["faults"]) == {"stop", "clock jump"}
    assert {"silent endpoint", "stalled endpoint", "busy endpoint"} <= set(runs["remote"]["faults"])
    assert all(run["messages_compared"] > 0 for run in runs.values())
    assert (tmp_path / "soak" / "soak.svg").exists()


def test_growth_is_measured_against_the_end_of_the_warm_up() -> None:
    samples = [[second, 1000 + 5 * second, 800, 8, 2, 4, 1] for second in range(100)]
    found = measure(samples, warm_up=60.0)
    assert found["resident_growth"] == pytest.approx((1000 + 5 * 99) / (1000 + 5 * 44.5) - 1, abs=1e-4)
    assert found["anonymous_growth"] == 0
    assert (found["files"], found["sockets"], found["threads"]) == ([8, 8], [2, 2], [4, 4])
