"""What can go wrong, as the user hears it.

Every message is one sentence that says what, where and what to do next; only the command line
prints it (exit 1). A mistake in how a command was called is a `UsageError` (exit 2).

    ParrotError
    ├── UsageError      arguments that cannot mean anything
    ├── InputError      a bad line, named by file and line
    ├── OutputError     the output cannot take what is written to it
    ├── ModelError      a model, an adapter or its template cannot be used
    ├── EndpointError   a remote engine failed for good
    └── ClusterError    no cluster is there, or it has lost its workers
"""

from __future__ import annotations

import reprlib

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring = 2, 60


def shorten(value: object) -> str:
    """A user's value as a message shows it: on one line, however long or deep it is.

    >>> shorten("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    try:
        return _repr.repr(value)
    except ValueError:  # Python does not write out numbers of thousands of digits
        return "a number of thousands of digits"


class ParrotError(Exception):
    """Base of all errors that parrot_edge raises on purpose."""


class UsageError(ParrotError):
    """The arguments of a call contradict each other or lie outside their range."""


class InputError(ParrotError):
    """A row of an input file cannot be used.

    >>> str(InputError("has no prompt", source="seeds.jsonl", line=3))
    'seeds.jsonl:3: has no prompt'
    """

    def __init__(self, reason: str, *, source: str | None = None, line: int | None = None) -> None:
        self.reason, self.source, self.line = reason, source, line
        place = f"{source}:{line}: " if source and line else f"{source}: " if source else ""
        super().__init__(place + reason)


class OutputError(ParrotError):
    """Writing failed; whatever was written before is whole."""


class ModelError(ParrotError):
    """A model file, an adapter or a chat template cannot be used."""


class EndpointError(ParrotError):
    """A remote endpoint kept failing after all retries."""


class ClusterError(ParrotError):
    """A Ray cluster cannot be joined or used, or has lost its workers."""
