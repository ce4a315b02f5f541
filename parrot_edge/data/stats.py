"""What a file of dialogues is like, by the measures that papers compare such data by.

One pass, in memory that does not grow with the file but for a number for each opening; what compares
texts with each other looks at a sample of the dialogues, drawn by their number alone. The measures are
defined in docs/data.md.
"""

from __future__ import annotations

import heapq
import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from parrot_edge.data.context import find_links
from parrot_edge.data.diversity import STRETCH, find_distinct, find_mtld, find_rouge_l, find_self_rouge
from parrot_edge.data.likeness import COMPARED
from parrot_edge.data.questions import QUESTION_TYPES, find_question_type
from parrot_edge.data.role import find_assistant_likeness
from parrot_edge.data.sources import Reader, Thread
from parrot_edge.data.text import words_of
from parrot_edge.dialogue import Message, parse_messages
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.errors import UsageError
from parrot_edge.figures import Resampling, readable
from parrot_edge.roles import sounds_like_assistant

SAMPLE = 2000
"""Dialogues whose texts are compared with each other."""

FOLLOW_UPS = 100
"""Messages that models are asked about."""

_TEXT = 1000
"""Words of users' messages that are measured by MTLD at once."""

_REASONLESS = "none"
_BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper ends of the bins of words in histograms; the last bin is open."""


@dataclass
class Mean:
    """The mean of a number for each dialogue, and the 95 % interval of a normal distribution."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

    def figure(self) -> dict[str, float] | None:
        """`{"value", "low", "high"}`, or None without dialogues."""
        if not self.count:
            return None
        mean = self.total / self.count
        variance = max(0.0, self.squares / self.count - mean * mean) * self.count / max(1, self.count - 1)
        margin = 1.96 * math.sqrt(variance / self.count)
        ends = {"value": mean, "low": mean - margin, "high": mean + margin}
        return {name: _six_digits(number) for name, number in ends.items()}


@dataclass
class Sample:
    """So many items of a stream, drawn by their number: another order of other items changes nothing."""

    size: int = SAMPLE
    _kept: list[tuple[int, int, Any]] = field(default_factory=list)

    def wants(self, number: int) -> bool:
        """Whether the item of this number is drawn, as far as is known."""
        return len(self._kept) < self.size or -derive_seed("stats", number) > self._kept[0][0]

    def add(self, number: int, item: Any) -> None:
        entry = (-derive_seed("stats", number), -number, item)
        if len(self._kept) < self.size:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    def items(self) -> list[Any]:
        """What was drawn, in the order of its draws."""
        return [item for *_, item in sorted(self._kept, key=lambda entry: entry[:2], reverse=True)]


class Statistics:
    """Dialogues are added one by one; `report` may be asked for at any time."""

    def __init__(self) -> None:
        self.dialogues = 0
        self.turns, self.user_words, self.assistant_words = Counter[int](), Counter[int](), Counter[int]()
        self.reasons, self.questions = Counter[str](), Counter[str]()
        self.follow_ups = self.dependent = self.shifts = self.phrases = 0
        self.likeness = 0.0
        self._per_dialogue = {name: Mean() for name in ("turns", "dependent", "shifts", "words")}
        self._openings: set[int] = set()
        self._sample, self._follow_ups = Sample(), Sample(FOLLOW_UPS)
        self._stretch: list[str] = []
        self._text: list[str] = []
        self._distinct, self._mtld = (Mean(), Mean()), Mean()

    def add(self, messages: Sequence[Message], stop_reason: str | None = None) -> None:
        """Measure a dialogue."""
        number, self.dialogues = self.dialogues, self.dialogues + 1
        said = [message.content for message in messages if message.role == "user"]
        words = [words_of(text[:COMPARED]) for text in said]
        self.turns[len(said)] += 1
        self.reasons[stop_reason or _REASONLESS] += 1
        self._add_links(messages)
        in_all = 0
        for message in messages:
            if message.role != "system":
                length = len(message.content.split())
                (self.user_words if message.role == "user" else self.assistant_words)[length] += 1
                in_all += length
        for text in said:
            self.questions[find_question_type(text)] += 1
            self.phrases += sounds_like_assistant(text)
            self.likeness += find_assistant_likeness(text) >= 0.5
        self._per_dialogue["turns"].add(len(said))
        self._per_dialogue["words"].add(in_all)
        if said:
            self._openings.add(hash(" ".join(words_of(said[0]))))
        if said and self._sample.wants(number):
            self._sample.add(number, (words, said[_drawn(number, len(said))][:COMPARED]))
        for each in words:
            self._add_words(each)

    def _add_links(self, messages: Sequence[Message]) -> None:
        dependent = shifts = 0
        for place, message in enumerate(messages):
            if message.role == "user" and any(other.role == "user" for other in messages[:place]):
                links = find_links(messages[max(0, place - 8) : place], message.content)
                dependent, shifts = dependent + links.dependent, shifts + links.shift
                if self._follow_ups.wants(self.follow_ups):
                    self._follow_ups.add(self.follow_ups, (messages[:place], message.content))
                self.follow_ups += 1
        self.dependent, self.shifts = self.dependent + dependent, self.shifts + shifts
        self._per_dialogue["dependent"].add(dependent)
        self._per_dialogue["shifts"].add(shifts)

    def _add_words(self, words: list[str]) -> None:
        """Distinct n-grams and MTLD, over what users say one after the other."""
        self._stretch += words
        while len(self._stretch) >= STRETCH:
            for n, mean in enumerate(self._distinct, 1):
                mean.add(find_distinct(self._stretch[:STRETCH], n))
            self._stretch = self._stretch[STRETCH:]
        self._text += words
        if len(self._text) >= _TEXT:
            self._mtld.add(find_mtld(self._text))
            self._text = []

    @property
    def drawn_turns(self) -> list[str]:
        """A user's message of each dialogue in the sample."""
        return [text for _, text in self._sample.items()]

    @property
    def drawn_follow_ups(self) -> list[tuple[Sequence[Message], str]]:
        """Messages after the opening, each with what was said before it."""
        return self._follow_ups.items()

    def report(self) -> dict[str, Any]:
        """All measures; None where there is nothing to measure."""
        messages = self.user_words.total()
        sample = [words for words, _ in self._sample.items()]
        rouge = Mean()
        for words in sample:
            if len(words) > 1:
                rouge.add(100 * find_self_rouge(words))
        short = Mean()
        if messages and not self._mtld.count:
            short.add(find_mtld(self._text))
        return {
            "dialogues": self.dialogues,
            "user_messages": messages,
            "assistant_messages": self.assistant_words.total(),
            "turns": self._per_dialogue["turns"].figure(),
            "context_dependent": {
                "per_dialogue": self._per_dialogue["dependent"].figure(),
                "share": _share(self.dependent, self.follow_ups),
            },
            "topic_shifts": {
                "per_dialogue": self._per_dialogue["shifts"].figure(),
                "share": _share(self.shifts, self.follow_ups),
            },
            "self_rouge": rouge.figure(),
            "distinct_1": self._distinct[0].figure(),
            "distinct_2": self._distinct[1].figure(),
            "mtld": (self._mtld if self._mtld.count else short).figure(),
            "words": {
                "dialogue": self._per_dialogue["words"].figure(),
                "user_mean": _mean(self.user_words),
                "user_median": _median(self.user_words),
                "assistant_mean": _mean(self.assistant_words),
                "assistant_median": _median(self.assistant_words),
            },
            "questions": {name: _share(self.questions[name], messages) for name in QUESTION_TYPES},
            "openings": _describe_openings([words[0] for words in sample])
            | {"distinct": _share(len(self._openings), self.dialogues - self.turns[0])},
            "wrong_role": {
                "phrases": _share(self.phrases, messages),
                "likeness": _share(self.likeness, messages),
            },
            "stop_reasons": {
                reason: _share(count, self.dialogues) for reason, count in self.reasons.most_common()
            },
            "histograms": {
                "turns": {str(turns): count for turns, count in sorted(self.turns.items())},
                "user_words": _binned(self.user_words),
                "assistant_words": _binned(self.assistant_words),
            },
        }


def describe_file(path: str, *, skip: bool = False) -> tuple[Statistics, Reader]:
    """The statistics of a file in any shape that `parrot train` reads, which may be empty, and its reader.

    Raises `InputError` for a row that cannot be used, or counts it (`skip`).
    """
    statistics, reader = Statistics(), Reader([path], skip=skip, may_be_empty=True)
    for messages, reason in reader.read(_parse):
        statistics.add(messages, reason)
    return statistics, reader


def compare_users(one: Statistics, other: Statistics, pairs: int = 500) -> dict[str, float] | None:
    """How well a classifier tells the users of one file from those of the other: an AUC with its interval.

    A message of each sampled dialogue is compared, as many of one file as of the other. Near 0.5 they
    cannot be told apart. None for fewer than 10 dialogues.
    Raises `UsageError` where scikit-learn is missing.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("telling users apart needs scikit-learn; run pip install 'parrot-edge[data]'")
    texts = list(zip(other.drawn_turns, one.drawn_turns, strict=False))[:pairs]
    if len(texts) < 10:
        return None
    from parrot_edge.data.likeness import tell_apart

    resampling, members = Resampling.of(len(texts))
    return readable(tell_apart(texts, members, resampling))


LEAST_LEAD = 0.3
"""Nats a token by which Ask has to find a user's message likelier than Chat does, as docs/data.md has it."""


def describe_roles(scores: Sequence[float]) -> dict[str, Any]:
    """The mean of `score_roles`, and the share of messages in the wrong role: below `LEAST_LEAD`."""
    mean = Mean()
    for score in scores:
        mean.add(score)
    return {
        "nats_a_token": mean.figure(),
        "share": _share(sum(score < LEAST_LEAD for score in scores), len(scores)),
    }


def _parse(thread: Thread) -> tuple[tuple[Message, ...], str | None]:
    reason = thread.row.get("stop_reason")
    return parse_messages(thread.line, thread.messages), reason if isinstance(reason, str) else None


def _describe_openings(openings: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """ROUGE-L of each opening with the next one of the sample, and the entropy of first words in bits."""
    pairs = list(pairwise(openings))
    firsts = Counter(" ".join(words[:2]) for words in openings)
    total = firsts.total()
    bits = -sum(count / total * math.log2(count / total) for count in firsts.values())
    rouge = sum(find_rouge_l(one, other) for one, other in pairs) / len(pairs) if pairs else None
    return {
        "rouge_l": None if rouge is None else _six_digits(100 * rouge),
        "first_words_bits": _six_digits(bits) if total else None,
    }


def _drawn(number: int, count: int) -> int:
    return derive_seed("turn", number) % count


def _share(cases: float, all_: int) -> float | None:
    return _six_digits(cases / all_) if all_ else None


def _mean(counts: Counter[int]) -> float | None:
    return _share(sum(value * count for value, count in counts.items()), counts.total())


def _median(counts: Counter[int]) -> int | None:
    """The lower median."""
    seen, half = 0, (counts.total() + 1) // 2
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    return None


def _binned(counts: Counter[int]) -> dict[str, int]:
    """How many have up to so many words: `{"1": ..., "2": ..., "4": ..., ..., "more": ...}`."""
    bins = dict.fromkeys([*map(str, _BINS), "more"], 0)
    for value, count in counts.items():
        bins[next((str(end) for end in _BINS if value <= end), "more")] += count
    return bins


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")
