"""A line on stderr that tells how far a run is."""

from __future__ import annotations

import contextlib
import sys
import time

from parrot_edge.simulate import Tally

_SECONDS_BETWEEN_LINES = 0.2


class ProgressLine:
    """Dialogues, turns, tokens/s and time left, rewritten in place; silent unless wanted.

    wanted  True, False, or None for "where stderr is a terminal"
    total   dialogues in all, or None where that is not known
    """

    def __init__(self, wanted: bool | None, total: int | None) -> None:
        self._on = sys.stderr.isatty() if wanted is None else wanted
        self._total = total
        self._next = 0.0
        self._shown = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        """What follows begins a line of its own."""
        if self._shown:
            _print("\n")

    def show(self, tally: Tally) -> None:
        """Rewrite the line, at most five times a second."""
        now = time.monotonic()
        if self._on and now >= self._next:
            self._next = now + _SECONDS_BETWEEN_LINES
            self._write(self._text(tally))

    def finish(self, tally: Tally) -> None:
        """Leave the last state on the screen."""
        if self._on:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items()))
            self._write(self._text(tally, over=True) + (f"; ended by: {reasons}" if reasons else ""))

    def _text(self, tally: Tally, *, over: bool = False) -> str:
        done = tally.dialogues + tally.skipped
        of = f"/{self._total}" if self._total is not None else ""
        rate = tally.tokens / max(tally.seconds, 1e-9)
        parts = [f"{done}{of} dialogues", f"{tally.messages} messages", f"{rate:.0f} tokens/s"]
        if over:
            parts.append(_duration(tally.seconds))
        elif self._total and done:
            parts.append(f"{_duration(tally.seconds * (self._total - done) / done)} left")
        if tally.skipped:
            parts.append(f"{tally.skipped} skipped")
        return " · ".join(parts)

    def _write(self, text: str) -> None:
        self._shown = True
        _print(f"\r{text}\x1b[K")


class StepLine:
    """What is being done and how far that is, a line each, rewritten in place; silent unless wanted.

    wanted  True, False, or None for "where stderr is a terminal"
    """

    def __init__(self, wanted: bool | None) -> None:
        self._on = sys.stderr.isatty() if wanted is None else wanted
        self._what = ""
        self._began = self._next = 0.0

    def __enter__(self) -> StepLine:
        return self

    def __exit__(self, *exc: object) -> None:
        """What follows begins a line of its own."""
        if self._what:
            _print("\n")

    def show(self, what: str, done: int, total: int) -> None:
        """Rewrite the line, at most five times a second; another `what` begins a new one."""
        now = time.monotonic()
        if what != self._what and self._on:
            if self._what:
                _print("\n")
            self._what, self._began, self._next = what, now, now
        if self._on and (now >= self._next or done == total):
            self._next = now + _SECONDS_BETWEEN_LINES
            seconds = now - self._began
            left = f"{_duration(seconds * (total - done) / done)} left"
            _print(f"\r{what} · {done}/{total} · {left if done < total else _duration(seconds)}\x1b[K")


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has gone must not end the run
        sys.stderr.write(text)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    """
    >>> _duration(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
