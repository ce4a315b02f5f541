"""The dialogues of a file as the places where Ask or Chat is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from parrot_edge.data.sources import Dialogue, Reader, is_held_out
from parrot_edge.dialogue import Message
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.errors import InputError, UsageError
from parrot_edge.figures import Member, Resampling


@dataclass(frozen=True)
class Turn:
    """A user turn that a person wrote after `history`, which may begin with a system message."""

    member: Member
    dialogue: int
    history: tuple[Message, ...]
    text: str

    @property
    def is_opening(self) -> bool:
        return all(message.role == "system" for message in self.history)


@dataclass(frozen=True)
class Stop:
    """A place after an answer, where the person `ended` the dialogue or went on."""

    member: Member
    dialogue: int
    history: tuple[Message, ...]
    ended: bool


@dataclass(frozen=True)
class Answer:
    """What was answered after `history`, which ends with the user's message and may begin with a system's.

    number  of the turn: the user's messages so far, >= 1
    """

    member: Member
    dialogue: int
    history: tuple[Message, ...]
    text: str

    @property
    def number(self) -> int:
        return sum(message.role == "user" for message in self.history)


@dataclass
class Source:
    """The dialogues of a file, as the places where Ask and Chat are measured, in order."""

    name: str
    groups: list[str]
    dialogues: int = 0
    places: list[Turn | Stop] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def turns(self) -> list[Turn]:
        return [place for place in self.places if isinstance(place, Turn)]


def read_source(
    path: str, *, held_out: float = 1.0, limit: int | None = None, seed: int = 0, skip: bool = False
) -> Source:
    """The dialogues of a file, in any shape that `parrot train` reads.

    held_out  only this share: what a recipe with the same `data.held_out` keeps back
    limit     only so many, drawn by `seed`; the branches of a tree count as one
    skip      leave rows out that cannot be used, instead of raising `InputError`
    """
    reader = Reader([path], skip=skip)
    groups: dict[str, list[Dialogue]] = {}
    for dialogue in reader.dialogues():
        if is_held_out(dialogue, held_out):
            groups.setdefault(dialogue.group, []).append(dialogue)
    if limit is not None:
        drawn = set(sorted(groups, key=lambda group: derive_seed(seed, group))[:limit])
        groups = {group: dialogues for group, dialogues in groups.items() if group in drawn}
    if not groups:
        raise InputError("holds no dialogue to measure on", source=path)
    source = Source(reader.sources[0].name, list(groups))
    for group, dialogues in groups.items():
        for place in _find_places(dialogues, (source.name, group), source.dialogues):
            if isinstance(place, Answer):
                source.answers.append(place)
            else:
                source.places.append(place)
        source.dialogues += len(dialogues)
    return source


def resample(sources: Sequence[Source], seed: int = 0) -> Resampling:
    """A resampling of the groups of all sources; raises `UsageError` where two share a name."""
    groups = {source.name: source.groups for source in sources}
    if len(groups) < len(sources):
        raise UsageError("two data files have the same name; rename one to tell their figures apart")
    return Resampling(groups, seed)


def _find_places(
    dialogues: Sequence[Dialogue], member: Member, number: int
) -> Iterator[Turn | Stop | Answer]:
    """The places of a group, in order and numbered from `number`; what dialogues share comes once, and
    they end only where none of them goes on."""
    threads = [
        tuple(Message(message.role, message.content.strip()) for message in dialogue.messages)
        for dialogue in dialogues
    ]
    gone_on = {thread[:end] for thread in threads for end in range(1, len(thread))}
    seen: set[tuple[Message, ...]] = set()
    for position, (thread, dialogue) in enumerate(zip(threads, dialogues, strict=True), number):
        for end, last in enumerate(thread, 1):
            said = thread[:end]
            if last.role == "system" or said in seen:
                continue
            seen.add(said)
            if last.role == "user":
                yield Turn(member, position, said[:-1], last.content)
                continue
            yield Answer(member, position, said[:-1], last.content)
            if said in gone_on or dialogue.ended:
                yield Stop(member, position, said, ended=said not in gone_on)
