"""One message more for every dialogue of a pipe: what `parrot ask` and `parrot chat` do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from parrot_edge.dialogue import Message, Seed
from parrot_edge.errors import ParrotError
from parrot_edge.roles import Speaker, say_as_ask, say_as_chat
from parrot_edge.simulate import concerns_one_dialogue, take_in_turn


async def extend_dialogues(
    role: str,
    speaker: Speaker,
    rows: Iterator[Seed] | AsyncIterator[Seed],
    write: Callable[[dict[str, Any]], None],
    *,
    run_seed: int = 0,
    parallel: int = 16,
    on_failure: Callable[[Seed, ParrotError], None] | None = None,
) -> None:
    """Write each row with the next message of `role` ("user" or "assistant"), as they finish.

    A dialogue that has a stop reason is passed on as it is; one that ends here gets its stop reason
    instead of a message. The others must be waiting for a message of `role`.
    """

    async def extend(seed: Seed) -> None:
        try:
            write(await _extend(role, speaker, seed, run_seed))
        except ParrotError as error:
            if on_failure is None or not concerns_one_dialogue(error):
                raise
            on_failure(seed, error)

    await take_in_turn(rows, extend, parallel)


async def _extend(role: str, speaker: Speaker, seed: Seed, run_seed: int) -> dict[str, Any]:
    messages = list(seed.messages)
    stop_reason = seed.extra.get("stop_reason")
    if stop_reason is None:
        async with speaker.engine.session() as session:
            say = say_as_ask if role == "user" else say_as_chat
            said = await say(speaker, session, seed, messages, run_seed)
        stop_reason = said.stop_reason
        if stop_reason is None:
            messages.append(Message(role, said.text))
    row: dict[str, Any] = {"id": seed.id, "messages": [message.as_dict() for message in messages]}
    for key, value in (("topic", seed.topic), ("persona", seed.persona)):
        if value is not None:
            row[key] = value
    return {**row, **seed.extra, "stop_reason": stop_reason}
