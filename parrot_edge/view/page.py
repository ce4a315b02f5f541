"""The page: dialogues compressed into one HTML file that shows, searches and filters them.

The page's parts are files beside this one; what a dialogue is, `shown` knows.

The file is laid out so that a browser can begin before it has read the end: the markup, an index with
a line for each dialogue, the script, then the dialogues in chunks. Index and chunks are JSON, deflated
(RFC 1951) and in base64, so that nothing in them can be taken for HTML. The only scripts that the
page's Content Security Policy admits are its own, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from parrot_edge.store import new_file
from parrot_edge.view.shown import Shown

_CHUNK_BYTES = 400_000
"""JSON in a chunk: what the browser unpacks to show one dialogue, in some milliseconds."""

_LABELS = 31
"""Labels of a kind that can be told apart, as each is a bit; rarer ones are shown as one."""


def write_page(dialogues: Iterable[Shown], output: IO[bytes], *, title: str) -> int:
    """Write a page and return how many dialogues it holds; memory grows by some hundred bytes for each.

    Raises whatever `dialogues` raises.
    """
    index = _Index(title)
    with tempfile.TemporaryFile() as chunks:  # they follow the index, which is known only at the end
        for text in _chunks(dialogues, index):
            chunks.write(b'<script type="text/plain" data-part="chunk">' + _pack(text) + b"</script>\n")
        head, tail = _frame(title).split("<!-- dialogues -->")
        output.write(head.encode())
        output.write(
            b'<script type="text/plain" data-part="index">' + _pack(index.as_json()) + b"</script>\n"
        )
        output.write(_scripts().encode())
        chunks.seek(0)
        while block := chunks.read(1 << 20):
            output.write(block)
        output.write(tail.encode())
    return index.count


@contextmanager
def open_page(target: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file that becomes `target` where the block ends well, and else is gone.

    Raises `OutputError` where `target` exists without `force`, or cannot be written.
    """
    with new_file(target, force=force) as draft, open(draft, "wb") as output:
        yield output


class _Index:
    """What the page knows of all dialogues before it unpacks any: columns of equal length."""

    def __init__(self, title: str) -> None:
        self.title, self.count = title, 0
        self.ids: list[str] = []
        self.openings: list[str] = []
        self.chunks: list[int] = []  # number of the first dialogue in each
        self.measures: dict[str, list[int]] = {}
        self.labels: dict[str, list[tuple[str, ...]]] = {}
        self._seen: Counter[str] = Counter()

    def add(self, shown: Shown) -> str:
        """Take a dialogue in, and return its address: its id, numbered where it is not the first with it."""
        address = shown.id
        while address in self._seen:
            self._seen[shown.id] += 1
            address = f"{shown.id}~{self._seen[shown.id]}"
        self._seen[address] = 1
        self.ids.append(address)
        self.openings.append(shown.opening)
        for name, number in shown.measures.items():
            self.measures.setdefault(name, []).append(number)
        for kind, labels in shown.labels.items():
            self.labels.setdefault(kind, []).append(labels)
        self.count += 1
        return address

    def as_json(self) -> str:
        facets = [{"kind": kind, **_as_bits(labels)} for kind, labels in self.labels.items() if any(labels)]
        measures = [{"name": name, "values": values} for name, values in self.measures.items()]
        return _json(
            {
                "title": self.title,
                "ids": self.ids,
                "openings": self.openings,
                "chunks": self.chunks,
                "measures": measures,
                "facets": facets,
            }
        )


def _as_bits(labels: list[tuple[str, ...]]) -> dict[str, Any]:
    """Labels, commonest first, and for each dialogue the sum of their bits.

    >>> _as_bits([("end",), (), ("turns", "end")])
    {'names': ['end', 'turns'], 'values': [1, 0, 3]}
    """
    counted = Counter(label for each in labels for label in each)
    names = [name for name, _ in counted.most_common()]
    if len(names) > _LABELS:
        names = [*names[: _LABELS - 1], "other"]
    bits = {name: 1 << at for at, name in enumerate(names)}
    values = []
    for each in labels:
        value = 0
        for label in each:
            value |= bits.get(label, bits.get("other", 0))
        values.append(value)
    return {"names": names, "values": values}


def _chunks(dialogues: Iterable[Shown], index: _Index) -> Iterator[str]:
    """Dialogues as JSON arrays of about `_CHUNK_BYTES`; each enters the index as it is taken."""
    texts: list[str] = []
    size = 0
    for shown in dialogues:
        if not texts:
            index.chunks.append(index.count)
        messages = [message.as_dict() for message in shown.messages]
        row = {"id": index.add(shown), "messages": messages, "details": shown.details}
        texts.append(_json(row if shown.rejected is None else {**row, "rejected": shown.rejected}))
        size += len(texts[-1])
        if size >= _CHUNK_BYTES:
            yield f"[{','.join(texts)}]"
            texts, size = [], 0
    if texts:
        yield f"[{','.join(texts)}]"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _pack(text: str) -> bytes:
    deflate = zlib.compressobj(level=6, wbits=-15)
    return base64.b64encode(deflate.compress(text.encode()) + deflate.flush())


def _part(name: str) -> str:
    return (files("parrot_edge.view") / name).read_text(encoding="utf-8")


def _frame(title: str) -> str:
    """The page without its data: everything that the browser shows first."""
    style = _part("page.css")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(_page_script())}'; "
        "worker-src blob:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types parrot"
    )
    filled = {"policy": policy, "style": style, "title": html.escape(title)}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _part("page.html"))


def _scripts() -> str:
    worker = _part("unpack.js") + _part("search.js")
    return (
        f'<script type="text/plain" data-part="worker">{worker}</script>\n<script>{_page_script()}</script>\n'
    )


def _page_script() -> str:
    return _part("unpack.js") + _part("page.js")


def _hash(text: str) -> str:
    """A source's name in a Content Security Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
