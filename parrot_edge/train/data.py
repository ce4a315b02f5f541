"""Dialogues to rows of tokens: the same stream for both roles, the labels alone differ.

A row holds `input_ids` and `labels`; a label is the token itself where it is to be learned and
`CONTEXT` elsewhere. Ask learns the user's turns, Chat the assistant's, each with what closes it;
headers, system text and the other side are context. Where a dialogue ended, the stream closes with a
user turn that holds nothing but its end, which is how Ask learns to end one.

**Long dialogues** go on in further rows. Each takes as many whole exchanges of the history as fit in
half of the row as context, then the next turns, then more history if there is room; so each token to
be learned stands in exactly one row, and is never cut off. Where not even the last exchange fits,
each of its turns keeps its end, a quarter of the row at most. A turn that does not fit beside its
history is split: its next part follows on the end of the part before, which is context there, and
only the last part is closed. Every row starts as a dialogue does, with the user.

It knows nothing of models; `template` knows how turns are written, `data.sources` where they come from.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from parrot_edge.data.sources import Dialogue, Reader, Source, is_held_out
from parrot_edge.dialogue import Message
from parrot_edge.errors import InputError
from parrot_edge.recipe import DataOptions
from parrot_edge.train.template import TurnTemplate, Unwritable

CONTEXT = -100
"""Label of a token that is read but not learned (what torch's cross-entropy ignores)."""

LEARNED = {"ask": "user", "chat": "assistant"}
"""Whose turns each role learns."""


@dataclass(frozen=True)
class Row:
    """Tokens of one dialogue or of a part of it: `input_ids`, `labels`: int32 (T,)."""

    input_ids: np.ndarray
    labels: np.ndarray
    source: str

    @property
    def targets(self) -> int:
        """Tokens to be learned."""
        return int((self.labels != CONTEXT).sum())


@dataclass(frozen=True)
class Turn:
    """Where a turn stands in the tokens: header from `start`, text from `text`, closed before `end`."""

    start: int
    text: int
    end: int


@dataclass
class Corpus:
    """Rows ready for training and for measuring, and how they came about.

    dropped  rows left out because they hold fewer than `min_targets` tokens to be learned
    skipped  source rows that could not be used (see `first_error`)
    """

    train: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    dialogues: int = 0
    dropped: int = 0
    skipped: int = 0
    first_error: str = ""

    def sha256(self) -> str:
        """Of all tokens and labels for training: what an adapter learned from."""
        digest = hashlib.sha256()
        for row in self.train:
            digest.update(row.input_ids.tobytes() + row.labels.tobytes())
        return digest.hexdigest()


def build_corpus(options: DataOptions, role: str, tokenizer: Any) -> Corpus:
    """Read the sources and make rows for a role ("ask" or "chat").

    Raises `InputError` naming file and line for a row that cannot be used, and where nothing is
    left to learn from; `ModelError` for a template that cannot be used.
    """
    template = TurnTemplate(tokenizer, system=options.system, system_text=options.system_text)
    reader = Reader(options.sources, skip=options.bad_rows == "skip")
    encoder = Encoder(template, tokenizer, role, options)
    corpus = Corpus()
    with contextlib.closing(reader.dialogues()) as dialogues:
        for dialogue in itertools.islice(dialogues, options.limit or None):
            try:
                row, turns = encoder.encode(dialogue)
                parts = split_row(row, turns, options.max_length)
            except Unwritable as error:
                reader.refuse(dialogue.line.error(str(error)))
                continue
            corpus.dialogues += 1
            kept = [part for part in parts if part.targets >= options.min_targets]
            corpus.dropped += len(parts) - len(kept)
            (corpus.held_out if is_held_out(dialogue, options.held_out) else corpus.train).extend(kept)
    _note(corpus, reader)
    if not corpus.train:
        raise InputError(
            f"{', '.join(options.sources)}: holds nothing that the {role} role could learn from "
            f"({corpus.dialogues} dialogues, {corpus.skipped} rows skipped); "
            f"{corpus.first_error or 'name other dialogues with --data'}"
        )
    return corpus


def build_pairs(options: DataOptions, tokenizer: Any) -> tuple[Corpus, dict[str, list[Any]]]:
    """Preference pairs as trl's DPO takes them, `prompt_ids`, `chosen_ids` and `rejected_ids` each.

    Returns a `Corpus` without rows that tells what was read, and the pairs under "train" and
    "held_out". Where history and answers exceed `max_length`, the oldest exchanges are left out.
    Raises as `build_corpus` does.
    """
    template = TurnTemplate(tokenizer, system=options.system, system_text=options.system_text)
    reader = Reader(options.sources, skip=options.bad_rows == "skip")
    encoder = Encoder(template, tokenizer, "chat", replace(options, learn_end="never"))
    corpus = Corpus()
    pairs: dict[str, list[Any]] = {"train": [], "held_out": []}
    with contextlib.closing(reader.pairs()) as found:
        for pair in itertools.islice(found, options.limit or None):
            asked = Dialogue((*pair.prompt, pair.chosen), None, False, pair.line)
            other = Dialogue((*pair.prompt, pair.rejected), None, False, pair.line)
            try:
                ids = _join_pair(encoder.encode(asked), encoder.encode(other), options.max_length)
            except Unwritable as error:
                reader.refuse(pair.line.error(str(error)))
                continue
            corpus.dialogues += 1
            pairs["held_out" if is_held_out(asked, options.held_out) else "train"].append(ids)
    _note(corpus, reader)
    if not pairs["train"]:
        raise InputError(
            f"{', '.join(options.sources)}: holds no preference pairs to learn from; "
            f"{corpus.first_error or 'name a file of them with --data'}"
        )
    return corpus, pairs


def _note(corpus: Corpus, reader: Reader) -> None:
    corpus.sources, corpus.skipped = reader.sources, reader.skipped
    corpus.first_error = str(reader.first_error or "")


def _join_pair(
    chosen: tuple[Row, list[Turn]], rejected: tuple[Row, list[Turn]], max_length: int
) -> dict[str, list[int]]:
    (row, turns), (other, others) = chosen, rejected
    last, opening = turns[-1], turns[0].text
    better = row.input_ids[last.text : last.end]
    worse = other.input_ids[others[-1].text : others[-1].end]
    room = max_length - max(len(better), len(worse)) - (last.text - last.start)
    history = _exchanges(turns, len(turns) - 1, last.start, room - opening)
    if not history:
        raise Unwritable(
            f"its last exchange and an answer take more than data.max_length {max_length} tokens"
        )
    ranges = [(0, opening), *history, (last.start, last.text)]
    prompt = np.concatenate([row.input_ids[start:stop] for start, stop in ranges])
    return {"prompt_ids": prompt.tolist(), "chosen_ids": better.tolist(), "rejected_ids": worse.tolist()}


class Encoder:
    """Dialogues to tokens and labels, counting a turn that branches of a tree share only once."""

    def __init__(self, template: TurnTemplate, tokenizer: Any, role: str, options: DataOptions) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._learned = LEARNED[role]
        self._options = options
        self._seen: set[bytes] = set()

    def encode(self, dialogue: Dialogue) -> tuple[Row, list[Turn]]:
        """The dialogue as one row, however long, and its turns.

        A turn that came before in the same tree is context. Raises `Unwritable` for what the
        template cannot write.
        """
        learn_end = self._options.learn_end
        ended = learn_end == "always" or (learn_end == "auto" and dialogue.ended)
        text, spans = self._template.render(self._shorten(dialogue.messages), ended=ended)
        tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(tokens["input_ids"], dtype=np.int32)  # (T,)
        offsets = np.asarray(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # (T, 2) characters
        labels, kept = np.full_like(ids, CONTEXT), np.ones(len(ids), dtype=bool)
        fresh = self._fresh_turns(dialogue, len(spans))
        most = self._options.turn_tokens or len(ids)
        turns, previous = [], 0
        for span, new in zip(spans, fresh, strict=True):
            # A token belongs to the turn if any of its characters do: one that joins the header's
            # last space to the first word is written by whoever writes the turn
            start = int(np.searchsorted(offsets[:, 1], span.start, side="right"))
            end = int(np.searchsorted(offsets[:, 0], span.close, side="left"))
            closing = max(start, int(np.searchsorted(offsets[:, 0], span.end, side="left")))
            turns.append(Turn(previous, start, end))
            previous = end
            if span.role != self._learned:
                continue
            if closing - start > most:
                kept[start + most : closing] = False
            if new:  # where a turn was cut nobody closed it
                stop = end if closing - start <= most else start + most
                labels[start:stop] = ids[start:stop]
        labels[:1] = CONTEXT  # nothing precedes the first token, so it cannot be predicted
        places = np.concatenate([[0], np.cumsum(kept)]).tolist()  # in what is kept
        turns = [Turn(places[turn.start], places[turn.text], places[turn.end]) for turn in turns]
        return Row(ids[kept], labels[kept], dialogue.line.source), turns

    def _shorten(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, those of the other side cut down to `shorten` words."""
        most = self._options.shorten
        if not most:
            return messages
        return [
            message
            if message.role in (self._learned, "system")
            else Message(message.role, cut_middle(message.content, most))
            for message in messages
        ]

    def _fresh_turns(self, dialogue: Dialogue, count: int) -> list[bool]:
        """For each turn, whether this tree did not show it before with the same history."""
        if dialogue.tree is None:
            return [True] * count
        digest, fresh = hashlib.sha256(dialogue.tree.encode()), []
        for message in dialogue.messages:
            digest.update(f"\0{message.role}\0{message.content}".encode())
            if message.role != "system":
                fresh.append(digest.digest() not in self._seen)
                self._seen.add(digest.digest())
        return fresh + [True] * (count - len(fresh))


def cut_middle(text: str, words: int) -> str:
    """The text with at most so many words: two thirds from its start, the rest from its end.

    >>> cut_middle("one two three four  five six seven", 3)
    'one two ... seven'
    """
    found = list(re.finditer(r"\S+", text))
    if len(found) <= words:
        return text
    head, tail = words - words // 3, words // 3
    return f"{text[: found[head - 1].end()]} ... {text[found[-tail].start() :] if tail else ''}".rstrip()


def find_active(row: Row, invocation: Sequence[int]) -> list[tuple[int, int]]:
    """Where an activated adapter is at work: from the invocation before each run of targets to its end.

    Ranges of tokens within the row; each starts with the nearest `invocation` before its targets.

    >>> ids, learned = np.array([9, 7, 8, 1, 2, 9, 7, 8, 3]), np.array([0, 0, 0, 1, 1, 0, 0, 0, 1])
    >>> find_active(Row(ids, np.where(learned, ids, CONTEXT), ""), [7, 8])
    [(1, 5), (6, 9)]
    """
    if len(row.input_ids) < len(invocation):
        return []
    learned = np.concatenate([[False], row.labels != CONTEXT, [False]])
    edges = np.flatnonzero(learned[1:] != learned[:-1]).reshape(-1, 2)  # (runs, 2)
    size, ranges = len(invocation), []
    windows = np.lib.stride_tricks.sliding_window_view(row.input_ids, size)
    places = np.flatnonzero((windows == np.asarray(invocation)).all(axis=1))
    for start, stop in edges:
        before = np.searchsorted(places, start - size, side="right")
        if before:
            ranges.append((int(places[before - 1]), int(stop)))
    return ranges


def split_row(row: Row, turns: Sequence[Turn], max_length: int) -> list[Row]:
    """The row in parts of at most `max_length` tokens, as the module says; each ends with a target.

    Raises `Unwritable` where what opens the dialogue takes more than a quarter of `max_length`.
    """
    if len(row.input_ids) <= max_length:
        parts = [(row.input_ids, row.labels)]
    else:
        parts = [_gather(row, context, new) for context, new in _windows(turns, max_length)]
    kept = []
    for ids, labels in parts:
        targets = np.flatnonzero(labels != CONTEXT)
        if len(targets):  # what follows the last target teaches nothing and is not computed
            stop = int(targets[-1]) + 1
            kept.append(Row(ids[:stop], labels[:stop], row.source))
    return kept


Range = tuple[int, int]
"""From and to within the tokens of a dialogue."""


def _gather(row: Row, context: Sequence[Range], new: Range) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([row.input_ids[start:stop] for start, stop in (*context, new)])
    labels = np.full_like(ids, CONTEXT)
    fresh = row.labels[slice(*new)]
    labels[len(ids) - len(fresh) :] = fresh
    return ids, labels


def _windows(turns: Sequence[Turn], max_length: int) -> Iterator[tuple[list[Range], Range]]:
    """Context and new tokens of each part, in order; the new ones join without a gap."""
    opening = (0, turns[0].text)
    room = max_length - turns[0].text
    if room < 0.75 * max_length:
        raise Unwritable(f"what opens it takes {turns[0].text} of {max_length} tokens; raise data.max_length")
    position, current = turns[0].text, 0
    while current < len(turns):
        context = [opening, *_history(turns, current, position, room // 2)]
        left = max_length - sum(stop - start for start, stop in context)
        stop, following = position, current
        while following < len(turns) and turns[following].end - position <= left:
            stop, following = turns[following].end, following + 1
        if stop == position:  # not even one turn fits: a part of it does
            stop = position + left
        elif position == turns[current].start:  # whole turns, and perhaps room for more history
            more = _exchanges(turns, current, position, max_length - turns[0].text - (stop - position))
            context = [opening, *more] if more else context
        yield context, (position, stop)
        position, current = stop, following


def _history(turns: Sequence[Turn], current: int, position: int, budget: int) -> list[Range]:
    """What of the dialogue before `position`, in turn `current`, fits in `budget` tokens."""
    turn, most = turns[current], budget // 2
    inside = position > turn.start and position > turn.text
    own = [(max(turn.text, position - most), position)] if inside else []
    if current % 2 == 0 and (inside or current == 0):  # a user turn may open the row itself
        return own
    if not inside:
        whole = _exchanges(turns, current, position, budget)
        if whole:
            return whole
    first = current - 1 if current % 2 else current - 2
    cut = []
    for index in range(first, current):
        before = turns[index]
        header = [] if index == first else [(before.start, before.text)]  # the opening holds the first's
        cut += [*header, (max(before.text, before.end - most), before.end)]
    return [*cut, (turn.start, turn.text), *own] if inside else cut


def _exchanges(turns: Sequence[Turn], current: int, position: int, budget: int) -> list[Range]:
    """The longest run of whole turns before `position` that starts with the user and fits."""
    for first in range(0, current, 2):
        if position - turns[first].text <= budget:
            return [(turns[first].text, position)]
    return []


def pack_rows(rows: Sequence[Row], max_length: int) -> list[list[Row]]:
    """Rows gathered so that each gathering holds at most `max_length` tokens; best fit, longest first.

    >>> sizes = [[len(row.input_ids) for row in pack] for pack in pack_rows(_rows_of(3, 9, 6, 1), 10)]
    >>> sizes
    [[9, 1], [6, 3]]
    """
    packs: list[list[Row]] = []
    free: list[tuple[int, int]] = []  # (room left, index of the pack), ascending
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        found = bisect.bisect_left(free, (size, -1))
        if found == len(free):
            packs.append([row])
            left, index = max_length - size, len(packs) - 1
        else:
            left, index = free.pop(found)
            packs[index].append(row)
            left -= size
        if left > 0:
            bisect.insort(free, (left, index))
    return packs


def _rows_of(*sizes: int) -> list[Row]:
    return [Row(np.zeros(size, np.int32), np.zeros(size, np.int32), "") for size in sizes]


def batch_rows(rows: Sequence[Row], options: DataOptions) -> list[list[Row]]:
    """Rows as they are given to the trainer: packed together, or one by one."""
    if options.batching == "packed":
        return pack_rows(rows, options.max_length)
    return [[row] for row in rows]


def sample_rows(rows: Iterable[Row], tokens: int) -> list[Row]:
    """Rows of about so many tokens together (0: all), chosen by their content, so always the same."""
    chosen, total = [], 0
    for row in sorted(rows, key=lambda row: hashlib.sha256(row.input_ids.tobytes()).digest()):
        if tokens and total >= tokens:
            break
        chosen.append(row)
        total += len(row.input_ids)
    return chosen
