"""Where dialogues come from: the shapes that public data has, read as one.

    {"messages": [{"role", "content"}, ...]}                parrot, UltraChat 200k and most others
    {"conversations": [{"from": "human", "value"}, ...]}    ShareGPT
    {"conversation": [{"role", "content"}, ...]}            WildChat, LMSYS
    {"data": [text, text, ...]}                             UltraChat: user and assistant in turn
    {"prompt": {"text", "role", "replies": [...]}}          Open-Assistant, a tree per row
    {"message_tree_id", "message_id", "parent_id", "text"}  Open-Assistant, a message per row
    {"prompt", "chosen", "rejected"}                        preference pairs

It knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from parrot_edge.dialogue import Message, content_id, parse_messages
from parrot_edge.errors import InputError, shorten
from parrot_edge.jsonl import Line, read_lines

_T = TypeVar("_T")

ROLE_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
}
"""What other formats call the two roles."""

ENDED = ("end", "farewell")
"""The `stop_reason`s of a simulated dialogue that somebody ended, rather than a limit."""


@dataclass(frozen=True)
class Thread:
    """Messages in order as a source has them, in one shape but not yet checked.

    row    the row that they come from; of a tree that came a message per row, its nested form
    tree   id of the tree whose branch they are, or None
    ended  as in `Dialogue`
    """

    line: Line
    row: dict[str, Any]
    messages: list[Any]
    tree: str | None
    ended: bool


@dataclass(frozen=True)
class Dialogue:
    """A dialogue that can be trained on.

    tree   id of the tree whose branches share their first turns, or None
    ended  whether the person was done where it stops: not in a simulation that ran into a limit,
           nor in a row marked `"truncated": true`, nor where the branch of a tree stops, which those
           who collected it ended; the end of a logged dialogue counts as one
    """

    messages: tuple[Message, ...]
    tree: str | None
    ended: bool
    line: Line

    @property
    def group(self) -> str:
        """What is never split between training and measuring: the tree, or all with this opening.

        Rows with the same opening are often one conversation that was stored as it grew.
        """
        opening = next(message.content for message in self.messages if message.role == "user")
        return self.tree or content_id(opening)


def is_held_out(dialogue: Dialogue, share: float) -> bool:
    """Whether a dialogue is kept back; depends on its group alone, so trees are never torn apart."""
    digest = hashlib.sha256(dialogue.group.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Pair:
    """Two answers to the same history, of which `chosen` is the better one."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    line: Line


@dataclass(frozen=True)
class Source:
    """A source as it was read: its name without folders, the rows read, and the SHA-256 of their lines."""

    name: str
    rows: int
    sha256: str


class Reader:
    """Reads sources one after the other; `sources` and `skipped` tell afterwards what was read.

    A source is a JSON Lines file or `hf:owner/name[:split]`. With `skip`, a row that cannot be used
    is counted instead of raising `InputError`, and `first_error` is the first of them; `on_refused` is
    told of each with its line. A source without rows raises it too, unless it may be empty. A
    preference pair is no dialogue, but with `chosen` is read as the one that ends in the chosen answer.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        skip: bool = False,
        may_be_empty: bool = False,
        chosen: bool = False,
        on_refused: Callable[[Line, InputError], None] = lambda line, error: None,
    ) -> None:
        self.names = tuple(names)
        self.skip = skip
        self.on_refused = on_refused
        self.may_be_empty = may_be_empty
        self.chosen = chosen
        self.skipped = 0
        self.first_error: InputError | None = None
        self.sources: list[Source] = []

    def dialogues(self) -> Generator[Dialogue, None, None]:
        """All dialogues of all sources, each with both sides."""
        return self.read(_dialogue)

    def read(self, make: Callable[[Thread], _T]) -> Generator[_T, None, None]:
        """What `make` makes of each thread of all sources; a row for which it raises is refused."""
        for name in self.names:
            loose: dict[str, list[tuple[Line, dict[str, Any]]]] = {}  # Open-Assistant, a message per row
            for line in self._lines(name):
                try:
                    row = line.row()
                    if "parent_id" in row and "message_tree_id" in row:
                        loose.setdefault(str(row["message_tree_id"]), []).append((line, row))
                        continue
                    is_pair = self.chosen and "chosen" in row and "rejected" in row
                    threads = _from_pair(line, row) if is_pair else _from_row(line, row)
                    found = [make(thread) for thread in threads]
                except InputError as error:
                    self.refuse(error)
                    self.on_refused(line, error)
                    continue
                yield from found
            for tree, rows in loose.items():
                try:
                    nested = _join_tree(rows)
                    found = [make(thread) for thread in _from_tree(rows[0][0], nested, nested, tree)]
                except InputError as error:
                    self.refuse(error)
                    self.on_refused(rows[0][0], error)
                    continue
                yield from found

    def pairs(self) -> Generator[Pair, None, None]:
        """All preference pairs of all sources."""
        for name in self.names:
            for line in self._lines(name):
                try:
                    pair = _pair(line, line.row())
                except InputError as error:
                    self.refuse(error)
                    continue
                yield pair

    def refuse(self, error: InputError) -> None:
        """Count a row that cannot be used, or raise its error."""
        if not self.skip:
            raise error
        self.skipped += 1
        self.first_error = self.first_error or error

    def _lines(self, name: str) -> Iterator[Line]:
        digest, count = hashlib.sha256(), 0
        try:
            for line in _hub_lines(name) if name.startswith("hf:") else read_lines(name):
                digest.update(line.data + b"\n")
                count += 1
                yield line
            if not count and not self.may_be_empty:
                raise InputError("holds no rows", source=name)
        finally:  # also where the caller has enough
            short = name if name.startswith("hf:") else Path(name).name
            self.sources.append(Source(short, count, digest.hexdigest()))


def _hub_lines(name: str) -> Iterator[Line]:
    """The rows of a hub dataset as lines; raises `InputError` where it cannot be had."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise InputError("needs pip install 'parrot-edge[train]'", source=name) from None
    repo, _, split = name.removeprefix("hf:").partition(":")
    try:
        rows = load_dataset(repo, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"cannot be loaded from the hub ({reason})", source=name) from None
    for number, row in enumerate(rows, 1):
        yield Line(name, number, json.dumps(row, ensure_ascii=False, default=str).encode())


def _from_row(line: Line, row: dict[str, Any]) -> Iterator[Thread]:
    """The thread of a row, or those of its tree; raises `InputError`."""
    if isinstance(root := row.get("prompt"), dict):
        yield from _from_tree(line, row, root, str(row.get("message_tree_id") or content_id(root)))
        return
    for column in ("messages", "conversations", "conversation", "data"):
        if isinstance(row.get(column), list):
            ended = row.get("stop_reason", "end") in ENDED and not row.get("truncated")
            tree = row.get("tree") or row.get("message_tree_id")
            messages = [_message(position, item) for position, item in enumerate(row[column])]
            yield Thread(line, row, messages, str(tree) if tree else None, ended and not tree)
            return
    raise line.error(
        "has none of the columns messages, conversations, conversation, data or prompt, "
        f"but {shorten(list(row))}"
    )


def _message(position: int, item: Any) -> Any:
    """A message as {"role", "content"}; what is none is left for the check that names its line.

    >>> _message(0, {"from": "human", "value": "hi"}), _message(1, "hello")
    ({'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'})
    """
    if isinstance(item, str):
        return {"role": ("user", "assistant")[position % 2], "content": item}
    if not isinstance(item, dict):
        return item
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value", item.get("text")))
    return {"role": ROLE_NAMES.get(role, role) if isinstance(role, str) else role, "content": content}


def _dialogue(thread: Thread) -> Dialogue:
    parsed = parse_messages(thread.line, thread.messages)
    if not any(message.role == "assistant" for message in parsed):
        raise thread.line.error("has no assistant turn; a dialogue to learn from has both sides")
    return Dialogue(parsed, thread.tree, thread.ended, thread.line)


def _join_tree(rows: list[tuple[Line, dict[str, Any]]]) -> dict[str, Any]:
    """A nested tree from Open-Assistant messages; raises `InputError` where one has no parent."""
    nodes: dict[Any, dict[str, Any]] = {}
    for line, row in rows:
        identity, parent = row.get("message_id"), row["parent_id"]
        if not isinstance(identity, str | int) or not isinstance(parent, str | int | None):
            raise line.error("its message_id and parent_id must be texts")
        if identity in nodes:
            raise line.error(f"its message_id {shorten(identity)} stands twice in its tree")
        nodes[identity] = {**row, "replies": []}
    roots: list[dict[str, Any]] = []
    for line, row in rows:
        parent = row["parent_id"]
        if parent is not None and parent not in nodes:
            raise line.error(f"its parent {shorten(parent)} is missing")
        (roots if parent is None else nodes[parent]["replies"]).append(nodes[row.get("message_id")])
    if len(roots) != 1:
        raise rows[0][0].error(f"its tree has {len(roots)} openings instead of one")
    return roots[0]


def _from_tree(line: Line, row: dict[str, Any], root: dict[str, Any], tree: str) -> Iterator[Thread]:
    """The threads of a tree from its root to each leaf, in order."""
    stack: list[tuple[Any, list[Any]]] = [(root, [])]
    while stack:
        node, before = stack.pop()
        thread = [*before, _message(len(before), node)]
        replies = node.get("replies") if isinstance(node, dict) else None
        if replies and not isinstance(replies, list):
            raise line.error(f"has replies that are no list, but {shorten(replies)}")
        if replies:
            stack += [(reply, thread) for reply in reversed(replies)]
        elif len(thread) > 1:  # an opening that nobody answered teaches nothing
            yield Thread(line, row, thread, tree, False)


def _from_pair(line: Line, row: dict[str, Any]) -> Iterator[Thread]:
    """The thread of a preference pair that ends in the chosen answer; raises `InputError`."""
    pair = _pair(line, row)
    yield Thread(line, row, [message.as_dict() for message in (*pair.prompt, pair.chosen)], None, True)


def _pair(line: Line, row: dict[str, Any]) -> Pair:
    """A preference pair; the two answers may be texts, or messages of which the last is the answer."""
    for column in ("prompt", "chosen", "rejected"):
        if not row.get(column):
            raise line.error(f'has no "{column}"; a preference pair has prompt, chosen and rejected')
    answers, prompt = [], row["prompt"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for column in ("chosen", "rejected"):
        answer = row[column][-1] if isinstance(row[column], list) else row[column]
        content = answer.get("content") if isinstance(answer, dict) else answer
        answers.append({"role": "assistant", "content": content})
    if not isinstance(prompt, list):
        raise line.error('"prompt" must be a text or a list of messages')
    messages = [_message(position, item) for position, item in enumerate(prompt)]
    chosen, rejected = (parse_messages(line, [*messages, answer]) for answer in answers)
    if chosen[-1] == rejected[-1]:
        raise line.error("its two answers are the same")
    return Pair(chosen[:-1], chosen[-1], rejected[-1], line)
