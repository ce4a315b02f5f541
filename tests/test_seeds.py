"""The shipped seeds are valid, and as varied as they are meant to be."""

from __future__ import annotations

import itertools
import re

import pytest

from parrot_edge.dialogue import Seed, parse_seed
from parrot_edge.jsonl import read_lines
from parrot_edge.seeds import builtin_path


@pytest.fixture(scope="module")
def seeds() -> list[Seed]:
    return [parse_seed(line) for line in read_lines(builtin_path())]


def opening(seed: Seed) -> str:
    return seed.messages[-1].content if seed.messages else ""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_there_are_about_two_hundred_seeds_of_each_kind(seeds: list[Seed]) -> None:
    assert len(seeds) >= 200
    assert sum(bool(opening(seed)) for seed in seeds) >= 150
    assert sum(seed.topic is not None for seed in seeds) >= 40
    assert sum(seed.persona is not None for seed in seeds) >= 20
    assert sum(bool(seed.messages) and seed.messages[0].role == "system" for seed in seeds) >= 5


def test_ids_are_unique_and_in_kebab_case(seeds: list[Seed]) -> None:
    assert len({seed.id for seed in seeds}) == len(seeds)
    assert [seed.id for seed in seeds if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", seed.id)] == []


def test_rows_hold_only_known_keys(seeds: list[Seed]) -> None:
    assert [seed.id for seed in seeds if seed.extra] == []


def test_openings_differ_in_length(seeds: list[Seed]) -> None:
    lengths = [len(opening(seed).split()) for seed in seeds if opening(seed)]
    assert sum(length <= 10 for length in lengths) >= 15
    assert sum(11 <= length <= 25 for length in lengths) >= 60
    assert sum(26 <= length <= 60 for length in lengths) >= 40
    assert sum(60 < length <= 250 for length in lengths) >= 4
    assert max(lengths) <= 250


def test_openings_differ_in_register(seeds: list[Seed]) -> None:
    openings = [opening(seed) for seed in seeds if opening(seed)]
    lower = sum(text[0].islower() for text in openings)
    assert 0.25 * len(openings) <= lower <= 0.75 * len(openings)
    assert sum(not text.rstrip().endswith((".", "?", "!")) for text in openings) >= 20
    assert sum("\n" in text for text in openings) >= 15


def test_no_first_word_dominates(seeds: list[Seed]) -> None:
    first = sorted(opening(seed).split()[0].lower() for seed in seeds if opening(seed))
    most = max(len(list(group)) for _, group in itertools.groupby(first))
    assert most <= 0.1 * len(first)
    assert len(set(first)) >= 80


def test_no_two_openings_say_the_same(seeds: list[Seed]) -> None:
    texts = [(seed.id, words(opening(seed) or seed.topic or "")) for seed in seeds]
    pairs = itertools.combinations(texts, 2)
    alike = [(a, b) for (a, left), (b, right) in pairs if len(left & right) > 0.5 * len(left | right)]
    assert alike == []


def test_first_sixteen_seeds_are_already_varied(seeds: list[Seed]) -> None:
    assert any(seed.topic for seed in seeds[:16])
    assert len({seed.id.split("-")[0] for seed in seeds[:16]}) >= 8
