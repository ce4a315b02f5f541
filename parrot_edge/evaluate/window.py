"""What of a history a context holds while the turns of a dialogue are measured in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parrot_edge.dialogue import Message
from parrot_edge.engine.likelihood import Likelihood


class Window:
    """The latest part of a history that fits; it moves in leaps, so that what the cache holds serves again.

    Where the context is full, the latest whole exchanges that fit in half of it are kept, and those that
    follow join them until it is full again; of a single exchange that takes more than that, the last
    eighth of the context of either message. Of a system message its first quarter of the context stays.

    role    whose next message is measured
    prompt  how a conversation is shown to the model
    first   the first turn that is kept; 0 where all of the history is
    """

    def __init__(
        self,
        likelihood: Likelihood,
        role: str,
        prompt: Callable[[Sequence[Message]], Sequence[Message]] = lambda messages: messages,
    ) -> None:
        self._likelihood, self._role, self._prompt = likelihood, role, prompt
        self._dialogue = -1
        self.first = 0

    def view_of(self, dialogue: int, history: Sequence[Message], text: str) -> Sequence[Message]:
        """The conversation as the model is prompted with it, before the message `text` of the dialogue of
        that number."""
        if dialogue != self._dialogue:
            self._dialogue, self.first = dialogue, 0
        most = self._likelihood.tokens // 4
        system = [
            Message("system", self._likelihood.first_part(message.content, most))
            for message in history
            if message.role == "system"
        ]
        turns = [message for message in history if message.role != "system"]

        def view_of(some: Sequence[Message]) -> Sequence[Message]:
            return self._prompt([*system, *some])

        if self._length(view_of(turns[self.first :]), text) > self._likelihood.tokens:
            half = self._likelihood.tokens // 2
            while self.first < len(turns) and self._length(view_of(turns[self.first :])) > half:
                self.first += 2
        if turns and self.first >= len(turns):
            last = turns[-1:] if turns[-1].role == "user" else turns[-2:]
            part = self._likelihood.tokens // 8
            return view_of([Message(m.role, self._likelihood.last_part(m.content, part)) for m in last])
        return view_of(turns[self.first :])

    def _length(self, view: Sequence[Message], text: str = "") -> int:
        return len(self._likelihood.encode(view, self._role, text)[0])
