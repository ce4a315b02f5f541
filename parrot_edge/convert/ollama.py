"""A model's chat template as the Go template of an Ollama Modelfile, where that can say the same.

The Jinja template is rendered with marks in place of texts, which shows what it writes between turns. A Go
template of these pieces is taken only if they make the very texts that Jinja makes of other dialogues.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parrot_edge.dialogue import Message
from parrot_edge.engine.native import Model
from parrot_edge.engine.template import ChatTemplate
from parrot_edge.errors import ModelError

_MARKS = ("PARROT-SYSTEM", "PARROT-USER", "PARROT-ANSWER", "PARROT-NEXT")

_RAW = "{{ .Prompt }}"  # hands over what was given, word by word


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around texts.

    opening  before the first user text, where there is no system message
    system   before and after a system text that comes first; None where the template takes none
    answer   after a user text: its end, and the header of the answer
    lead     between that and an answer which is there already: a space, mostly nothing
    user     after an answer: its end, and the header of the next user text
    """

    opening: str
    system: tuple[str, str] | None
    answer: str
    lead: str
    user: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the answer to `messages`, which end with the user's; a system message may lead."""
        parts = [] if messages[0].role == "system" else [self.opening]
        for message in messages:
            before, after = {
                "system": self.system or ("", ""),
                "user": ("", self.answer),
                "assistant": (self.lead, self.user),
            }[message.role]
            parts += [before, message.content, after]
        return "".join(parts)


def find_pieces(template: ChatTemplate) -> Pieces | None:
    """A chat template taken apart; None for one that does more than to write something between texts."""
    system, user, answer, following = _MARKS
    dialogue = [Message("user", user), Message("assistant", answer), Message("user", following)]
    try:
        opening, after_user, between, rest = _split(template.render(dialogue), [user, answer, following])
    except (ModelError, ValueError):
        return None
    if not after_user.startswith(rest):
        return None
    try:
        told = template.render([Message("system", system), Message("user", user)])
        before, after, closing = _split(told, [system, user])
        around = (before, after) if closing == rest else None
    except (ModelError, ValueError):
        around = None
    pieces = Pieces(opening, around, rest, after_user.removeprefix(rest), between)
    try:
        same = all(
            template.render(sample) == pieces.render(sample) for sample in _samples(around is not None)
        )
    except ModelError:
        return None
    return pieces if same else None


def to_go_template(pieces: Pieces, *, bos: str = "") -> str:
    """The pieces as a Go template over Ollama's `.Messages`; `bos` is left out at the start, where Ollama
    writes it itself."""
    opening = pieces.opening.removeprefix(bos)
    lines = [f"{{{{- if not .System }}}}{_literal(opening)}{{{{ end }}}}"]
    lines.append("{{- range $i, $_ := .Messages }}")
    lines.append("{{- $last := eq (len (slice $.Messages $i)) 1 }}")
    if pieces.system is not None:
        before, after = pieces.system
        text = f"{_literal(before.removeprefix(bos))}{{{{ .Content }}}}{_literal(after)}"
        lines.append(f'{{{{- if eq .Role "system" }}}}{text}{{{{ end }}}}')
    lines.append(f'{{{{- if eq .Role "user" }}}}{{{{ .Content }}}}{_literal(pieces.answer)}{{{{ end }}}}')
    answer = (
        f"{_literal(pieces.lead)}{{{{ .Content }}}}{{{{ if not $last }}}}{_literal(pieces.user)}{{{{ end }}}}"
    )
    lines.append(f'{{{{- if eq .Role "assistant" }}}}{answer}{{{{ end }}}}')
    lines.append("{{- end }}")
    return "\n".join(lines)


def write_modelfile(path: Path, adapter: Path | None = None, *, role: str | None = None) -> str:
    """The Modelfile for a GGUF, with an adapter over it or none, that lie beside it.

    Ollama only ever writes the assistant's turn. A model that plays the user ("ask") therefore gets the
    prompt as it is given, to be written out by whoever asks. Raises `ModelError` for a file that cannot
    be read.
    """
    with Model(path, vocab_only=True) as model:
        template = model.chat_template
        bos = model.bos if model.adds_bos else ""
        parsed = (
            ChatTemplate(template, bos=model.bos, eos=model.eos, name=path.name)
            if template is not None
            else None
        )
        pieces = find_pieces(parsed) if parsed is not None else None
        closing = ""
        if pieces is not None:
            after = pieces.answer if role == "ask" else pieces.user
            tokens = model.tokenize(after.encode("utf-8"))
            ends = next((token for token in tokens if model.ends_turn(token)), None)
            closing = "" if ends is None else model.piece(ends).decode("utf-8", "replace")
    lines = [f"FROM ./{path.name}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter.name}")
    if role == "ask":
        lines += ["# It plays the user: give it the prompt word by word, as README.md shows.", _quoted(_RAW)]
    elif pieces is not None:
        lines.append(_quoted(to_go_template(pieces, bos=bos)))
    else:
        lines.append("# Its chat template cannot be said in Go; Ollama looks for one like it by itself.")
    if closing and '"' not in closing and "\n" not in closing:
        lines.append(f'PARAMETER stop "{closing}"')
    return "\n".join([*lines, ""])


def _quoted(template: str) -> str:
    return f'TEMPLATE """{template}"""'


def _literal(text: str) -> str:
    """Text as a Go template that writes it: as it stands, but for what templates or Modelfiles read.

    >>> print(_literal("<s>[INST] "), _literal("a\\n"), _literal("{{x"))
    {{ "<s>[INST] " }} {{ "a\\n" }} {{ "{{x" }}
    """
    if not text:
        return ""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    escaped = re.sub(r"[\x00-\x1f]", lambda match: f"\\x{ord(match[0]):02x}", escaped)
    return f'{{{{ "{escaped}" }}}}'


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after the marks; raises `ValueError` where one is not there once."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(mark)
        pieces.append(before)
    return [*pieces, text]


def _samples(takes_system: bool) -> list[list[Message]]:
    """Dialogues of other lengths than those that a template is taken apart with."""
    turns = [
        Message(("user", "assistant")[number % 2], f"Text {number}: a\n\nb, 'c'.") for number in range(7)
    ]
    samples = [turns[:1], turns[:3], turns]
    if takes_system:
        samples += [[Message("system", "Be brief."), *some] for some in samples]
    return samples
