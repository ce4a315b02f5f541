"""GGUF files that are wrong in meaning rather than in form: a value, a type, a shape or a name is another."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import Any

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_SMALL = (0, 1, 2, 3, 4, 7, 8, 16, 31, 64, 255, 256, 512, 513, 1000)
_ODD = (*_SMALL, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
_TEXTS = (
    *(b"", b" ", b"\n", b"\0", b"\xff\xfe", b"llama", b"qwen2", b"mamba", b"gemma3", b"clip", b"bert"),
    *(b"gpt2", b"spm", b"t5", b"rwkv", b"none", b"plamo2", b"llama-bpe", b"yarn", b"linear", b"adapter"),
)


@dataclass
class Parts:
    """A file in pieces: values as (key, type, value), arrays as a type and a list; tensors as (name, shape,
    type, offset)."""

    values: list[tuple[bytes, int, Any]]
    tensors: list[tuple[bytes, list[int], int, int]]
    data: bytes


def take_apart(content: bytes) -> Parts:
    """The pieces of a whole file."""
    at = 8

    def number(code: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize("<" + code)
        return found

    def text() -> bytes:
        nonlocal at
        size = number("Q")
        at += size
        return content[at - size : at]

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind == _ARRAY:
            item, count = number("I"), number("Q")
            return item, [value(item) for _ in range(count)]
        return number(_CODES[kind])

    count, pairs = number("Q"), number("Q")
    values = []
    for _ in range(pairs):
        key, kind = text(), number("I")
        values.append((key, kind, value(kind)))
    tensors = []
    for _ in range(count):
        name, dimensions = text(), number("I")
        tensors.append((name, [number("Q") for _ in range(dimensions)], number("I"), number("Q")))
    return Parts(values, tensors, content[-(-at // 32) * 32 :])


def put_together(parts: Parts) -> bytes:
    """The file of some pieces."""

    def text(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    def value(kind: int, given: Any) -> bytes:
        if kind == _TEXT:
            return text(given)
        if kind == _ARRAY:
            item, members = given
            head = struct.pack("<IQ", item, len(members))
            return head + b"".join(value(item, member) for member in members)
        code = _CODES[kind]
        return struct.pack("<" + code, given if code in "fd" else _wrap(int(given), code))

    out = struct.pack("<4sIQQ", b"GGUF", 3, len(parts.tensors), len(parts.values))
    for key, kind, given in parts.values:
        out += text(key) + struct.pack("<I", kind) + value(kind, given)
    for name, shape, kind, offset in parts.tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + parts.data


def _wrap(number: int, code: str) -> int:
    """The number that is left of one that is too large for its type."""
    size = 2 ** (8 * struct.calcsize("<" + code))
    return number % size if code.isupper() else (number + size // 2) % size - size // 2


def disturb(parts: Parts, dice: random.Random) -> None:
    """One to three changes, in place."""
    for _ in range(dice.randint(1, 3)):
        if dice.random() < 0.7 and parts.values:
            _disturb_value(parts, dice)
        elif parts.tensors:
            _disturb_tensor(parts, dice)


def _disturb_value(parts: Parts, dice: random.Random) -> None:
    index = dice.randrange(len(parts.values))
    key, kind, value = parts.values[index]
    choice = dice.random()
    if choice < 0.15:
        del parts.values[index]
    elif choice < 0.25:
        other = dice.choice(parts.values)
        parts.values[index] = key, other[1], other[2]
    elif choice < 0.3:
        parts.values[index] = dice.choice(parts.values)[0], kind, value
    elif kind == _ARRAY:
        parts.values[index] = key, kind, _other_array(*value, dice)
    elif kind == _TEXT:
        parts.values[index] = key, kind, _other_text(value, dice)
    elif choice < 0.4:
        parts.values[index] = key, dice.choice(list(_CODES)), value if value == value else 0
    elif kind in (6, 12):
        parts.values[index] = key, kind, dice.choice([0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan")])
    else:
        parts.values[index] = key, kind, dice.choice(_ODD)


def _other_array(item: int, members: list[Any], dice: random.Random) -> tuple[int, list[Any]]:
    members = list(members)
    choice = dice.random()
    if choice < 0.2:
        return item, members[: dice.randint(0, len(members))]
    if choice < 0.35:
        return item, members + members
    if not members or choice < 0.45:
        return dice.choice([4, 5, 6, 7]), [dice.randrange(256) for _ in members]
    place = dice.randrange(len(members))
    if item == _TEXT:
        members[place] = dice.choice([_other_text(members[place], dice), dice.choice(members)])
    else:
        members[place] = dice.choice(_SMALL)
    return item, members


def _other_text(text: bytes, dice: random.Random) -> bytes:
    return dice.choice([*_TEXTS, text + text, text[: dice.randint(0, len(text))], text * 500])


def _disturb_tensor(parts: Parts, dice: random.Random) -> None:
    index = dice.randrange(len(parts.tensors))
    name, shape, kind, offset = parts.tensors[index]
    choice = dice.random()
    if choice < 0.2:
        del parts.tensors[index]
    elif choice < 0.5:
        place = dice.randrange(len(shape) + 1)
        shape = [*shape[:place], dice.choice(_ODD), *shape[place + 1 :]]
        parts.tensors[index] = name, shape, kind, offset
    elif choice < 0.6:
        parts.tensors[index] = name, shape[::-1], kind, offset
    elif choice < 0.75:
        parts.tensors[index] = name, shape, dice.choice([*range(45), 2**31]), offset
    elif choice < 0.9:
        parts.tensors[index] = name, shape, kind, dice.choice([*_ODD, offset + 1, offset + 32])
    else:
        others = [tensor[0] for tensor in parts.tensors]
        parts.tensors[index] = dice.choice([*others, _other_text(name, dice)]), shape, kind, offset
