"""How a tokenizer's chat template wraps turns: where each turn starts, and what closes it.

Nothing is known of any template beforehand. Each is rendered with marks in place of the texts, which
shows what it writes before, between and after them; the same pieces then enclose the real texts, and
what the template makes of these must come out letter by letter. So templates that trim, that put the
system text into the first user turn, that refuse a system message or a dialogue that starts with the
assistant all take the same path.

It knows nothing of the role to be learned, of rows or of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from parrot_edge.dialogue import Message
from parrot_edge.errors import ModelError

END_MARKER = ""
"""What the user's turn holds when there is nothing more to say: it is closed without a word.
An Ask model ends a dialogue so: the first token it writes is the one that closes its turn."""

_OTHER = "give one with --set base.chat_template=FILE"

_TRIMS = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to a text; str leaves it as it is


@dataclass(frozen=True)
class Prompt:
    """How the turns are written; it travels with the adapter, so that it is prompted as it was trained.

    system            where the system text came from: "row", "template", "text" or "none"
    opening           all before the first user text, in a dialogue without a system message of its own
    user_header       what stands before a later user text; a prompt that ends in it asks for one
    user_end          what closes a user turn
    assistant_header  what stands before an answer
    assistant_end     what closes an answer
    end_marker        the text of the user turn that ends a dialogue
    """

    system: str
    opening: str
    user_header: str
    user_end: str
    assistant_header: str
    assistant_end: str
    end_marker: str = END_MARKER


@dataclass(frozen=True)
class Span:
    """A turn within a rendered text: `text[start:end]` is what was said, `text[end:close]` closes it."""

    role: str
    start: int
    end: int
    close: int


class Unwritable(ValueError):
    """A dialogue that cannot become rows; whoever knows its file and line says so."""


class TurnTemplate:
    """A tokenizer's chat template, taken apart.

    `system` says where the system text comes from, as `recipe.DataOptions` explains. Raises
    `ModelError` where there is no template, or where it does not close turns.
    """

    def __init__(self, tokenizer: Any, *, system: str = "row", system_text: str = "") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template; give one with --set base.chat_template=FILE"
            )
        self._tokenizer = tokenizer
        self._source = system
        self._text = system_text or None
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._pieces = lru_cache(maxsize=1024)(self._find_pieces)
        try:
            self._takes_system = True
            self._find_pieces(("user",), "system")
        except Unwritable:
            self._takes_system = False
        try:
            _, to_assistant, self._to_user, _ = self._pieces(("user", "assistant", "user"), None)
            self._close = {
                "user": self._find_close(self._pieces(("user",), None)[-1], to_assistant),
                "assistant": self._find_close(self._pieces(("user", "assistant"), None)[-1], self._to_user),
            }
        except Unwritable as error:
            raise ModelError(f"the chat template cannot be learned: {error}; {_OTHER}") from None
        header = self._to_user.removeprefix(self._close["assistant"])
        self._header = header.lstrip()
        self.prompt = Prompt(
            system=system,
            opening=self._opening(self._pieces(("user",), self._text)[0]),
            user_header=header,
            user_end=self._close["user"],
            assistant_header=to_assistant.removeprefix(self._close["user"]),
            assistant_end=self._close["assistant"],
        )

    def invocation(self, role: str) -> str:
        """What stands right before every text of a role ("user" or "assistant")."""
        return self._header if role == "user" else self.prompt.assistant_header.lstrip()

    def render(self, messages: Sequence[Message], *, ended: bool = False) -> tuple[str, list[Span]]:
        """The dialogue as text, and its turns in order.

        With `ended`, the user's closing turn (`END_MARKER`) follows the last answer and is a span
        too. Raises `Unwritable` for a text that the template changes beyond trimming it, or that
        holds a control token.
        """
        system, turns = self._split_system(messages)
        pieces = self._pieces(tuple(turn.role for turn in turns), system)
        texts = self._find_texts(turns, pieces, self._render(turns, system))
        parts: list[str] = []
        spans, length = [], 0
        afters = [*pieces[1:-1], self._last(pieces[-1], turns[-1].role)]
        for turn, before, text, after in zip(turns, pieces[:-1], texts, afters, strict=True):
            parts += [before if parts else self._opening(before), text]
            length += len(parts[-2])
            spans.append(self._span(turn.role, length, text, after))
            length += len(text)
        if ended and turns[-1].role == "assistant":
            parts += [self._to_user, END_MARKER, self._close["user"]]
            spans.append(self._span("user", length + len(self._to_user), END_MARKER, parts[-1]))
        else:
            parts.append(afters[-1])
        return "".join(parts), spans

    def as_prompted(self, messages: Sequence[Message]) -> list[Message]:
        """The dialogue with the system text that counts, in the place where the template takes it."""
        system, turns = self._split_system(messages)
        return self._place_system(turns, system)

    def _split_system(self, messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
        """The system text that counts, or None, and the turns."""
        system = messages[0].content if messages[0].role == "system" else None
        turns = messages[1:] if system is not None else messages
        return system if self._source == "row" else self._text, turns

    def _span(self, role: str, start: int, text: str, after: str) -> Span:
        if not after.startswith(self._close[role]):
            raise Unwritable(f"the chat template closes the {role}'s turns in more than one way")
        end = start + len(text)
        return Span(role, start, end, end + len(self._close[role]))

    def _last(self, tail: str, role: str) -> str:
        """What follows the last turn: a template that closes it by the next header writes nothing."""
        return tail if tail.startswith(self._close[role]) else self._close[role]

    def _find_close(self, tail: str, gap: str) -> str:
        """What closes a turn, from what follows it at the end of a dialogue and in the middle."""
        tail = tail.rstrip()
        eos = self._tokenizer.eos_token or ""
        # Some templates write an EOS once, at the very end; some close a turn by the next one's header
        for close in (tail, tail.removesuffix(eos).rstrip(), "" if tail else gap.rstrip()):
            if close and gap.startswith(close):
                return close
        raise Unwritable("it does not close turns the same way everywhere")

    def _opening(self, text: str) -> str:
        """What stands before the first text; with `system: none`, no more than a BOS and the header."""
        if self._source != "none" or not text.endswith(self._header):
            return text
        bos = self._tokenizer.bos_token
        before = text.removesuffix(self._header)
        # Where each turn begins with it (ChatML's, Llama 2's), the header has it already
        keep = bos and before.startswith(bos) and not self._header.startswith(bos)
        return (bos if keep else "") + self._header

    def _find_pieces(self, roles: tuple[str, ...], system: str | None) -> list[str]:
        """What the template writes before, between and after texts of these roles."""
        marks = [f"\ue000{position}\ue001" for position in range(len(roles))]
        rest = self._render([Message(*pair) for pair in zip(roles, marks, strict=True)], system)
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise Unwritable("it leaves out what was said")
            pieces.append(before)
        return [*pieces, rest]

    def _find_texts(self, turns: Sequence[Message], pieces: list[str], whole: str) -> list[str]:
        """What became of each text in the rendered whole: itself, or itself trimmed."""
        texts, position = [], len(pieces[0])
        for number, (turn, after) in enumerate(zip(turns, pieces[1:], strict=True), 1):
            token = next((token for token in self._control if token in turn.content), None)
            if token is not None:
                raise Unwritable(f"turn {number} holds the control token {token!r} as text")
            for trim in _TRIMS:
                text = trim(turn.content)
                if whole.startswith(text + after, position):
                    break
            else:
                raise Unwritable(f"the chat template changes the text of turn {number}")
            texts.append(text)
            position += len(text) + len(after)
        if position != len(whole):
            raise Unwritable("the chat template writes more than the turns")
        return texts

    def _place_system(self, turns: Sequence[Message], system: str | None) -> list[Message]:
        """A system text that the template refuses goes before the first user text."""
        if system is None:
            return list(turns)
        if self._takes_system:
            return [Message("system", system), *turns]
        return [Message(turns[0].role, f"{system}\n\n{turns[0].content}"), *turns[1:]]

    def _render(self, turns: Sequence[Message], system: str | None) -> str:
        """The template's own rendering."""
        import jinja2

        rows = [message.as_dict() for message in self._place_system(turns, system)]
        try:
            return self._tokenizer.apply_chat_template(rows, tokenize=False)
        except jinja2.TemplateError as error:
            raise Unwritable(f"the chat template refuses it: {error}") from None
