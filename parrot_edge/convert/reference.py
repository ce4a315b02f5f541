"""What a trained model says, written down: what every file that is made of it is held against.

    reference.json   texts and their tokens, what the targets' probabilities were, continuations
    vocabulary.json  the text of every token
    log_probs.f16    float16 (N, V): ln P of every token, at N of the targets
    anchors.f16      float16 (2, M, V): the same at the first M of these, with none and with twice the adapter

`listen` writes such a folder, with torch; it is read without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.dialogue import Message
from parrot_edge.errors import ModelError
from parrot_edge.store import parse_json

FORMAT = 1
"""Of the folder; one of another number is written anew."""

TEXT, TURN_END, DIALOGUE_END = range(3)
"""What a target is: a token of what is said, what closes a turn, what closes a turn without a word."""

ANCHORS = (0.0, 2.0)
"""How much of the adapter `anchors.f16` has; `log_probs.f16` has 1."""


@dataclass(frozen=True)
class Text:
    """A dialogue as the trained model is given it.

    messages  with the system text that counts
    starts    where the text of each turn begins, in characters of `text`
    tokens    of all of `text`
    hard      whether it is one of the texts that are easily got wrong, rather than a real one
    """

    messages: tuple[Message, ...]
    text: str
    starts: tuple[int, ...]
    tokens: tuple[int, ...]
    hard: bool


@dataclass(frozen=True)
class Passage:
    """A dialogue, or its beginning, and what the trained model makes of its targets.

    group      what is drawn together when resampling: a tree, or all with the same opening
    tokens     as training lays them out
    places     of the targets among them
    own        whether each is of the role that was trained; else of the other one
    kinds      `TEXT`, `TURN_END` or `DIALOGUE_END` of each
    log_probs  ln P(target | all before it), of each
    rows       the place of each in `log_probs.f16`, or -1
    """

    group: str
    tokens: list[int]
    places: np.ndarray
    own: np.ndarray
    kinds: np.ndarray
    log_probs: np.ndarray
    rows: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Passage:
        types = {"own": bool, "log_probs": np.float64}
        columns = {
            name: np.asarray(values[name], types.get(name, np.int64))
            for name in ("places", "own", "kinds", "log_probs", "rows")
        }
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError
        return cls(values["group"], values["tokens"], **columns)


@dataclass(frozen=True)
class Continuation:
    """What the trained model writes next, taking the likeliest token each time: at most `limit` tokens
    after a prompt of `length`."""

    messages: tuple[Message, ...]
    next_role: str
    text: str
    length: int
    limit: int


@dataclass(frozen=True)
class Reference:
    """What a trained model says; see the module for the files.

    name         of the adapter
    role         "ask", "chat", or None where it is not known (then the targets are the assistant's)
    facts        base, licence and versions, for people and for the checks of metadata
    closing      the first token of what closes a turn of "user" and of "assistant"
    control      the tokenizer's special tokens
    eos          the tokenizer's token for the end of a text, or None
    invocation   tokens that an activated adapter begins with, else empty
    made_up      whether the passages are the trained model's own words, as there were no dialogues
    missing      what is not measured, and why, a sentence each
    vocabulary   the text of every token as the tokenizer stores it, None for numbers without one
    log_probs    float16 (N, V), mapped
    anchors      float16 (2, M, V), mapped
    """

    name: str
    role: str | None
    facts: dict[str, Any]
    closing: dict[str, int]
    control: list[int]
    eos: int | None
    invocation: list[int]
    made_up: bool
    missing: list[str]
    texts: list[Text]
    passages: list[Passage]
    continuations: list[Continuation]
    vocabulary: list[str | None]
    log_probs: np.ndarray
    anchors: np.ndarray

    @property
    def groups(self) -> list[str]:
        """Those of the passages, each once."""
        return list(dict.fromkeys(passage.group for passage in self.passages))


def read_reference(folder: Path) -> Reference:
    """What `listen.write_reference` wrote; raises `ModelError` where it is missing or damaged."""
    try:
        record = parse_json(folder / "reference.json")
        vocabulary = parse_json(folder / "vocabulary.json")
        if record["format"] != FORMAT:
            raise ValueError
        size, rows, anchored = record["logits"], record["rows"], record["anchored"]
        return Reference(
            **{
                key: record[key]
                for key in (
                    "name",
                    "role",
                    "facts",
                    "closing",
                    "control",
                    "eos",
                    "invocation",
                    "made_up",
                    "missing",
                )
            },
            texts=[
                Text(_messages(t["messages"]), t["text"], tuple(t["starts"]), tuple(t["tokens"]), t["hard"])
                for t in record["texts"]
            ],
            passages=[Passage.from_dict(passage) for passage in record["passages"]],
            continuations=[
                Continuation(_messages(c["messages"]), c["next_role"], c["text"], c["length"], c["limit"])
                for c in record["continuations"]
            ],
            vocabulary=vocabulary,
            log_probs=_map(folder / "log_probs.f16", (rows, size)),
            anchors=_map(folder / "anchors.f16", (len(ANCHORS), anchored, size)),
        )
    except OSError as error:
        raise ModelError(
            f"{folder} is no reference of a trained model ({Path(error.filename).name}: {error.strerror}); "
            "write one"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(
            f"{folder} is damaged, or was written by another version; write the reference anew"
        ) from None


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if path.stat().st_size != 2 * int(np.prod(shape)):
        raise ValueError
    return np.memmap(path, np.float16, "r", shape=shape)


def _messages(values: Sequence[Sequence[str]]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in values)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


_CODE = (
    "def f(x):\n    if x != 0x1F:\n\treturn {\"a\": [1, 2], 'b': x**-2}  # 100%\n\n\nprint(f(3) <= 4 && y)"
)
_SPACES = "two  spaces,   three,\ttab\t\tand\n\n\nlines\n  indented\r\n\u00a0hard\u2003wide \u200bzero end"
_SCRIPTS = (
    "naïve café e\u0301 Straße — “ΑΒΓ” "
    "Привет 你好，世界 こんにちは 안녕 مرحبا שלום हिन्दी 🦜👩\u200d👩\u200d👧🏽🇨🇭 \ufffd"
)
_NUMBERS = "7 42 1234567 3.14159 1,024.50 -0.001e-10 2024-02-30T23:59 ٣٤٥ ½ x²≥10⁶ 0b1010 192.168.0.1"
_LOOKALIKES = "<|im_strat|> <|im_start |> < s> [INST ] <|end <<SYS> </ s> <|endoftext> {{ bos }} <0x0A> ▁a Ġb"
_WORDS = "It's DON'T I'LL we've o'clock HTTPServer snake_case camelCase C++ #tag @me a/b\\c ~~~ ... !!! ?!"

HARD_DIALOGUES: tuple[tuple[Message, ...], ...] = (
    (Message("user", _SCRIPTS), Message("assistant", _NUMBERS)),
    (Message("user", _SPACES), Message("assistant", _CODE), Message("user", _LOOKALIKES)),
    (Message("user", "a"), Message("assistant", "."), Message("user", "  "), Message("assistant", "\n")),
    (Message("system", ""), Message("user", "Who are you?"), Message("assistant", "Nobody.")),
    (
        Message("system", "Be brief."),
        *(Message(*pair) for pair in (("user", _WORDS), ("assistant", "1")) * 4),
    ),
    (Message("user", "word " * 60 + "end"), Message("assistant", "ab" * 120 + "=" * 40)),
)
"""What tokenizers and templates are most often at odds over."""
