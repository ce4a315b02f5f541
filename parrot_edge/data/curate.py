"""Which dialogues to keep for training: filters, duplicates, and what would leak a benchmark.

Rows are judged one by one, in order, and each goes to the output or, with the reason, to the rejects. As
each does so at once, the two files say how far a run has come: a run that was killed goes on from them.
How each reason is found, and what it misses, is in docs/data.md.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from parrot_edge import __version__
from parrot_edge.data.duplicates import Duplicates
from parrot_edge.data.language import is_language
from parrot_edge.data.personal import find_personal
from parrot_edge.data.sensitive import load_word_list
from parrot_edge.data.sources import Reader, Thread
from parrot_edge.dialogue import Message, content_id, parse_messages
from parrot_edge.errors import InputError, OutputError, UsageError
from parrot_edge.jsonl import Appender, Line, Writer, encode, read_lines
from parrot_edge.roles import find_repetition, sounds_like_assistant
from parrot_edge.store import read_json, write_json

REASONS = {
    "malformed": "the row is no dialogue",
    "short": "too few answered turns, or too few words in them",
    "cut_off": "an answer stops in the middle",
    "wrong_role": "the user answers as an assistant does",
    "repetitive": "a side says again what it has said, or runs in a circle",
    "language": "the user writes in another language",
    "sensitive": "an entry of the word list",
    "personal": "personal data or a key",
    "duplicate": "the same words as an earlier row",
    "near_duplicate": "nearly the same words as an earlier row",
    "leak": "a question of a file that must not be trained on",
}
"""Why a row is rejected; the first that applies is given."""

QUESTION_WORDS = 4
"""Words of the shortest question that can leak: shorter ones, as "tell me more", are anybody's."""

_SAID_BEFORE_CUT = 20
"""Words of the shortest answer that is taken to be cut off: short ones end without a full stop."""

_ENDS = tuple(".!?…:;)]}>|*_`\"'”’»~—-。！？」』）0123456789")
"""What an answer that is whole ends with; more may be, see `stops_in_the_middle`."""

_ITEM_MARKS = ("-", "*", "•", "#", "|", "+")


@dataclass(frozen=True)
class Rules:
    """What is rejected.

    min_turns  fewest answered turns
    min_words  fewest words of a user's message, on average
    language   ISO 639-1 code of the language that users write, or None for any
    words      the word list, or None for the one that comes with the package
    allowed    reasons that do not count
    """

    min_turns: int = 2
    min_words: int = 2
    language: str | None = None
    words: str | None = None
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Why a row is rejected: one of `REASONS`, and what was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Entry:
    """A row of the input: its dialogue, or with `refusal` why it is none."""

    line: Line
    thread: Thread | None = None
    messages: Sequence[Message] = ()
    refusal: InputError | None = None


class Examiner:
    """Finds what is wrong with a dialogue by itself, whatever the others are."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._words = load_word_list(Path(rules.words) if rules.words else None)

    def examine(self, messages: Sequence[Message]) -> Verdict | None:
        """The first reason against a dialogue."""
        reasons = self._find_reasons(messages)
        return next((verdict for verdict in reasons if verdict.reason not in self._rules.allowed), None)

    def examine_all(self, dialogues: Sequence[Sequence[Message]]) -> list[Verdict | None]:
        """The same for many."""
        return [self.examine(messages) for messages in dialogues]

    def _find_reasons(self, messages: Sequence[Message]) -> Iterator[Verdict]:
        rules = self._rules
        asked = [message.content for message in messages if message.role == "user"]
        answers = [message.content for message in messages if message.role == "assistant"]
        if len(answers) < rules.min_turns:
            yield Verdict("short", f"{len(answers)} answered turns")
        elif sum(len(text.split()) for text in asked) < rules.min_words * len(asked):
            yield Verdict("short", f"fewer than {rules.min_words} words in the user's messages, on average")
        if (place := _find_cut(answers)) is not None:
            yield Verdict("cut_off", f"answer {place + 1}: ...{answers[place][-40:]}")
        for place, text in enumerate(asked[1:], 2):  # an opening may be a list that somebody pasted
            if sounds_like_assistant(text):
                yield Verdict("wrong_role", f"user message {place}: {text[:40]}...")
        for side, texts in (("user", asked), ("assistant", answers)):
            if (place := find_repetition(texts)) is not None:
                yield Verdict("repetitive", f"{side} message {place + 1}")
        if rules.language and not is_language("\n".join(asked), rules.language):
            yield Verdict("language", f"not {rules.language}")
        said = _all_said(messages)
        if found := self._words.find(said):
            yield Verdict("sensitive", found)
        if found := find_personal(said):
            yield Verdict("personal", found)


Examine = Callable[[Sequence[Message]], Verdict | None]
"""Finds the first reason against a dialogue, whatever the others are."""

Spread = Callable[[Examiner, Iterable[Entry]], Iterable[tuple[Entry, Examine]]]
"""Has rows examined elsewhere: each comes back, in order, with what knows the answer."""


class Judge:
    """Judges dialogues by the rules and by those that it kept before.

    against  files whose questions must not be in the output; raises `InputError` where they cannot be read
    """

    def __init__(self, rules: Rules, against: Sequence[str] = ()) -> None:
        self.examiner = Examiner(rules)
        self._rules = rules
        compares = not {"duplicate", "near_duplicate"} <= set(rules.allowed)
        self._kept = Duplicates() if compares else None
        self._questions = Duplicates() if against else None
        for path in against:
            for line, messages in Reader([path]).read(lambda thread: (thread.line, _parse(thread))):
                for text in _questions_of(messages):
                    self._questions.add(text, f"{line.source}:{line.number}")  # type: ignore[union-attr]

    def judge(self, messages: Sequence[Message], name: str, tree: str | None = None) -> Verdict | None:
        """The first reason against a dialogue; without one it is kept under a name, and None returned."""
        return self.settle(messages, name, tree, self.examiner.examine(messages))

    def settle(
        self, messages: Sequence[Message], name: str, tree: str | None, found: Verdict | None
    ) -> Verdict | None:
        """The same for a dialogue that has been examined by itself, with what was found."""
        if found is not None:
            return found
        for verdict in self._find_repeated(messages, tree):
            if verdict.reason not in self._rules.allowed:
                return verdict
        self.keep(messages, name, tree)
        return None

    def keep(self, messages: Sequence[Message], name: str, tree: str | None = None) -> None:
        """Remember a dialogue that was kept, as what later ones must not repeat."""
        if self._kept is not None:
            self._kept.add(_all_said(messages), name, tree)

    def _find_repeated(self, messages: Sequence[Message], tree: str | None) -> Iterator[Verdict]:
        said = _all_said(messages)
        if self._kept is not None and (repeated := self._kept.find(said, tree)):
            yield Verdict(repeated[0], repeated[1])
        if self._questions is not None:
            for text in _questions_of(messages):
                if leaked := self._questions.find(text):
                    yield Verdict("leak", leaked[1])


def _all_said(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role != "system")


def _questions_of(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message.role == "user" and len(message.content.split()) >= QUESTION_WORDS:
            yield message.content


def _find_cut(answers: Sequence[str]) -> int | None:
    """The first answer that stops in the middle of a sentence or of a block of code, or None."""
    for place, answer in enumerate(answers):
        if stops_in_the_middle(answer):
            return place
    return None


def stops_in_the_middle(answer: str) -> bool:
    """Whether a text was cut off: an open block of code, or prose whose last line ends without a mark.

    >>> prose = "The kettle is best filled with water and vinegar in equal parts, then boiled once and left"
    >>> stops_in_the_middle(prose + " for half an hour until the"), stops_in_the_middle(prose + ".")
    (True, False)
    """
    text = answer.rstrip()
    if text.count("```") % 2:
        return True
    if text.endswith(_ENDS) or not text[-1:].isalpha() or len(text.split()) < _SAID_BEFORE_CUT:
        return False
    last = text.rsplit("\n", 1)[-1].strip()
    words = last.split()
    # The items of a list, a signature, verse and headings end without a mark, and are short
    return len(words) > 12 and not last.startswith(_ITEM_MARKS) and not set(words[-1]) & set("#/")


# The run


@dataclass
class Report:
    """What became of the rows."""

    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        reasons = {reason: self.rejected[reason] for reason in REASONS if self.rejected[reason]}
        return {"read": self.read, "kept": self.kept, "rejected": reasons}


def curate_file(
    source: str,
    output: Path | None,
    rejects: Path,
    rules: Rules,
    *,
    against: Sequence[str] = (),
    skip: bool = False,
    resume: bool = False,
    force: bool = False,
    on_progress: Callable[[Report], None] = lambda report: None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Copy the rows worth keeping, in order, and the others to `rejects` with their reasons.

    A row is written as it was read; one of another shape than `messages` is written in that shape, and a
    tree as its threads. `OUTPUT.curate.json` tells what was done; while a run is under way it says so, and
    what the rules are. Without an output (None) the rows go to stdout, and no run can be resumed. With
    `skip`, a row that is no dialogue is rejected too instead of raising `InputError`. With `resume`, rows
    that stand in one of the files are not judged again. With `spread` they are examined
    elsewhere, and settled here.

    Raises `UsageError` for a resume by other rules, `InputError` for one of other rows, and `OutputError`
    for files that exist.
    """
    settings = {
        "source": source,
        "against": list(against),
        "rules": {**asdict(rules), "allowed": list(rules.allowed)},
        "skip": skip,
    }
    state = output.with_name(output.name + ".curate.json") if output else None
    goes_on = False
    if output is not None and state is not None and resume and _was_begun(output, state):
        goes_on, before = True, read_json(state)
        _check_state(before, settings, output)
        if before.get("complete"):
            return before
    elif not (force or resume):
        for path in (output, rejects):
            if path is not None and path.exists():
                raise OutputError(f"{path} exists; --resume carries it on, --force replaces it")
    judge = Judge(rules, against)
    with contextlib.ExitStack() as files:
        rejected = files.enter_context(Appender(rejects, truncate=not goes_on))
        kept = files.enter_context(Appender(output, truncate=not goes_on)) if output else None
        if state:
            write_json(state, {"complete": False, "settings": settings})
        run = _Run(judge, kept, rejected)
        refused: list[Entry] = []
        reader = Reader(
            [source],
            skip=skip,
            may_be_empty=True,
            on_refused=lambda line, error: refused.append(Entry(line, refusal=error)),
        )
        examiner = judge.examiner
        entries = _read_entries(reader, refused)
        try:
            here = zip(entries, repeat(examiner.examine), strict=False)
            for entry, examine in spread(examiner, entries) if spread else here:
                run.take(entry, examine)
                if run.report.read % 1000 == 0:
                    on_progress(run.report)
            run.finish()
        except BaseException:
            _drop_empty([kept, rejected], state)
            raise
        for file in filter(None, (kept, rejected)):
            file.sync()
    report = {"complete": True, "settings": settings, **run.report.as_dict()}
    report |= {"sha256": reader.sources[0].sha256, "version": __version__}
    if state:
        write_json(state, report)
    return report


def _read_entries(reader: Reader, refused: list[Entry]) -> Iterator[Entry]:
    """What is read and what the reader refuses meanwhile, in order."""
    for entry in reader.read(lambda thread: Entry(thread.line, thread, _parse(thread))):
        yield from refused
        refused.clear()
        yield entry
    yield from refused


def _was_begun(output: Path, state: Path) -> bool:
    """Whether there is something to carry on: an empty file alone is nothing."""
    return state.exists() or (output.exists() and output.stat().st_size > 0)


def _drop_empty(files: Sequence[Appender | None], state: Path | None) -> None:
    """Leave nothing behind where a run failed before its first row."""
    there = [file for file in files if file is not None]
    if not any(file.size for file in there):
        for file in there:
            file.discard()
        if state is not None:
            state.unlink(missing_ok=True)


def _check_state(before: Mapping[str, Any], settings: Mapping[str, Any], output: Path) -> None:
    if "settings" not in before:
        raise UsageError(f"{output} was not begun by parrot curate; choose another -o, or --force")
    for key, value in settings.items():
        if before["settings"].get(key) != value:
            raise UsageError(
                f"{output} was begun with other {key}; resume with the same, or start with --force"
            )


class _Run:
    """Rows on their way to one of two files, which may hold some of them already."""

    def __init__(self, judge: Judge, kept: Appender | None, rejected: Appender) -> None:
        self._judge, self._kept, self._rejected = judge, kept, rejected
        self._stdout = Writer()
        self.report = Report()
        self._earlier = _read_so_far(kept)
        self._next = next(self._earlier, None)
        self._judged: Counter[tuple[int, str | None]] = Counter()
        self._reasons: dict[tuple[int, str | None], str] = {}
        for line in _read_so_far(rejected):
            row = line.row()
            try:
                key = (row["line"], row["id"])
                self._judged[key] += 1
                self._reasons[key] = row["reason"]
            except (KeyError, TypeError):
                raise line.error("is no row of rejects; start with --force") from None

    def take(self, entry: Entry, examine: Examine) -> None:
        """Judge a row, unless it was."""
        if entry.thread is None:
            self._refuse(entry)
            return
        thread, messages = entry.thread, entry.messages
        row = _as_row(thread, messages)
        name = f"{thread.line.source}:{thread.line.number}"
        self.report.read += 1
        data = encode(row)
        if self._next is not None and self._next.data + b"\n" == data:
            self._next = next(self._earlier, None)
            self._judge.keep(messages, name, thread.tree)
            self.report.kept += 1
            return
        identity = row.get("id")
        identity = identity if isinstance(identity, str) else content_id(row["messages"])
        if self._was_rejected(thread.line, identity):
            return
        verdict = self._judge.settle(messages, name, thread.tree, examine(messages))
        if verdict is not None:
            self._reject(thread.line, identity, verdict, row)
            return
        self.finish()
        if self._kept is not None:
            self._kept.append_bytes(data)
        else:
            self._stdout.write(row)
        self.report.kept += 1

    def _refuse(self, entry: Entry) -> None:
        """Reject a line that is no dialogue."""
        assert entry.refusal is not None
        self.report.read += 1
        if not self._was_rejected(entry.line, None):
            self._reject(entry.line, None, Verdict("malformed", entry.refusal.reason), None)

    def finish(self) -> None:
        """Raise `UsageError` where the output holds rows that those read so far do not give."""
        if self._next is not None:
            raise self._next.error(
                "is no row that the input gives; resume with the same rows, or use --force"
            )

    def _was_rejected(self, line: Line, identity: str | None) -> bool:
        key = (line.number, identity)
        if not self._judged[key]:
            return False
        self._judged[key] -= 1
        self.report.rejected[self._reasons[key]] += 1
        return True

    def _reject(self, line: Line, identity: str | None, verdict: Verdict, row: dict[str, Any] | None) -> None:
        text = None if row is not None else line.data[:10_000].decode("utf-8", "replace")
        self.report.rejected[verdict.reason] += 1
        self._rejected.append(
            {
                "source": line.source,
                "line": line.number,
                "id": identity,
                "reason": verdict.reason,
                "detail": verdict.detail,
                "row": row,
                "text": text,
            }
        )


def _read_so_far(file: Appender | None) -> Iterator[Line]:
    """The rows that a file holds when it is opened."""
    return read_lines(file.path) if file is not None and file.size else iter(())


def _parse(thread: Thread) -> tuple[Message, ...]:
    return parse_messages(thread.line, thread.messages)


def _as_row(thread: Thread, messages: Sequence[Message]) -> dict[str, Any]:
    """The row as it was read, or in the shape of `messages`."""
    row = thread.row
    plain = [message.as_dict() for message in messages]
    own = row.get("messages")
    if isinstance(own, list):
        if [(item.get("role"), item.get("content")) for item in own] == [
            (m.role, m.content) for m in messages
        ]:
            return row
        return {**row, "messages": plain}
    if thread.tree and not any(isinstance(row.get(key), list) for key in _COLUMNS):
        return {"id": content_id(plain), "messages": plain, "tree": thread.tree}
    others = {key: value for key, value in row.items() if key not in _COLUMNS}
    return {"id": content_id(plain), **others, "messages": plain}


_COLUMNS = ("conversations", "conversation", "data")
