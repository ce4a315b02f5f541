"""How Ask and Chat are prompted, and how it shows that a message went wrong or a dialogue is over.

Ask plays the user. Where the engine can write any role's message, Ask continues the conversation
after the user's header, as it was trained ("native"). A remote endpoint only writes as the
assistant: there Ask is told whom to play and sees the roles exchanged ("flipped").

It knows engines only by what `engine.base` promises.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Engine, Reply, Request, Sampling, Session
from parrot_edge.engine.sampling import derive_seed

ATTEMPTS = 3
"""How often a message is drawn before its fault ends the dialogue."""

END_MARK = "[END]"
"""What a flipped Ask writes to end the dialogue; a native one leaves its message empty."""


ROLE_KEY, SYSTEM_KEY = "parrot.role", "parrot.system"
"""Metadata of a GGUF that was trained for a role: "ask" or "chat", and the system text it was trained
with where that was a fixed one."""


@dataclass(frozen=True)
class AskPrompt:
    """How Ask is prompted.

    native  continue after the user's header; else be told to play the user, with roles exchanged
    system  the system line, or None for what the model's template does without one
    """

    native: bool
    system: str | None = None


NATIVE = AskPrompt(native=True)
FLIPPED = AskPrompt(
    native=False,
    system=(
        "You play a person who is talking to an AI assistant. You ask; the assistant answers.\n"
        "Write only the person's next message: short, casual, the way people type.\n"
        "React to the last answer: ask about a detail, object, add something about yourself, or move on.\n"
        "Never answer questions, never offer help, never explain.\n"
        f"When you have got what you wanted, write {END_MARK} and nothing else."
    ),
)
"""The prompts that did best; docs/benchmarks.md has the others and the figures."""


@dataclass(frozen=True)
class Speaker:
    """One side of a dialogue: an engine, how it draws, and how it is prompted as Ask (None: as suits it)."""

    engine: Engine
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    prompt: AskPrompt | None = None

    @property
    def ask_prompt(self) -> AskPrompt:
        """How this engine is prompted as Ask: as it was trained, if its file says so."""
        if self.prompt is not None:
            return self.prompt
        if not self.engine.writes_any_role:
            return FLIPPED
        if self.engine.metadata.get(ROLE_KEY) == "ask":
            return AskPrompt(native=True, system=self.engine.metadata.get(SYSTEM_KEY))
        return NATIVE


@dataclass(frozen=True)
class Utterance:
    """What a side said: the message's text, or in `stop_reason` why there is none.

    `read` and `made` count tokens over all attempts; `cut` tells that `max_tokens` was reached.
    """

    text: str = ""
    stop_reason: str | None = None
    read: int = 0
    made: int = 0
    cut: bool = False


def ask_view(seed: Seed, messages: Sequence[Message], prompt: AskPrompt) -> list[Message]:
    """The conversation as Ask is prompted with it; ends where Ask is to write."""
    turns = [message for message in messages if message.role != "system"]
    if prompt.native:
        parts = [prompt.system or ""]
        if seed.persona:
            parts.append(f"The user is {seed.persona}.")
        if seed.topic and not turns:
            parts.append(f"The user asks about {seed.topic}.")
        line = " ".join(part for part in parts if part)
        return [Message("system", line), *turns] if line else list(messages)
    lines = [prompt.system or ""]
    if seed.persona:
        lines.append(f"The person you play is {seed.persona}.")
    if seed.topic:
        lines.append(f"The conversation is about {seed.topic}.")
    exchanged = {"user": "assistant", "assistant": "user"}
    return [
        Message("system", "\n".join(lines)),
        Message("user", "Hello! How can I help you today?"),
        *(Message(exchanged[message.role], message.content) for message in turns),
    ]


async def say_as_ask(
    ask: Speaker, session: Session, seed: Seed, messages: Sequence[Message], run_seed: int
) -> Utterance:
    """Ask's next message, or why there is none; a message with a fault is drawn again."""
    prompt = ask.ask_prompt
    said = [message.content for message in messages if message.role == "user"]

    def fault(text: str) -> str | None:
        if not text or END_MARK in text:
            return "end"
        if sounds_like_assistant(text):
            return "role_flip"
        return "repetition" if repeats(text, said) else None

    return await _say(
        ask,
        session,
        ask_view(seed, messages, prompt),
        "user" if prompt.native else "assistant",
        fault,
        (run_seed, seed.id, len(messages), "ask"),
    )


async def say_as_chat(
    chat: Speaker,
    session: Session,
    seed: Seed,
    messages: Sequence[Message],
    run_seed: int,
    on_text: Callable[[str], None] | None = None,
) -> Utterance:
    """Chat's next message, or why there is none; a repeated or empty one is drawn again."""
    said = [message.content for message in messages if message.role == "assistant"]

    def fault(text: str) -> str | None:
        return "repetition" if not text or repeats(text, said) else None

    return await _say(
        chat, session, messages, "assistant", fault, (run_seed, seed.id, len(messages), "chat"), on_text
    )


async def _say(
    speaker: Speaker,
    session: Session,
    view: Sequence[Message],
    next_role: str,
    fault: Callable[[str], str | None],
    draw: tuple[object, ...],
    on_text: Callable[[str], None] | None = None,
) -> Utterance:
    read = made = 0
    reason: str | None = None
    for attempt in range(1 if on_text else ATTEMPTS):
        reply: Reply = await session.reply(
            Request(
                view,
                next_role,
                max_tokens=speaker.max_tokens,
                sampling=speaker.sampling,
                seed=derive_seed(*draw, attempt),
                on_text=on_text,
            )
        )
        read, made = read + reply.new_tokens, made + reply.completion_tokens
        if reply.finish == "context":
            return Utterance(stop_reason="context", read=read, made=made)
        text = reply.text.strip()
        reason = fault(text)
        if reason is None or (on_text and text):
            return Utterance(text, read=read, made=made, cut=reply.finish == "length")
        if reason == "end":
            break
    return Utterance(stop_reason=reason, read=read, made=made)


_ASSISTANT_OPENINGS = re.compile(
    r"(?:sure|certainly|of course|absolutely|(?:that's a )?(?:great|good) question|here(?:'s| is| are)"
    r"|i(?:'d| would| am|'m) (?:be )?(?:happy|glad) to|happy to help|i'm (?:here to|sorry|just a|an ai)"
    r"|i can (?:help|assist)|let me (?:help|explain|know)|as an ai|i am an ai|i apologi[sz]e|you're welcome"
    r"|(?:how|what) can i (?:help|assist|do for)|to (?:answer|address) your|it (?:seems|sounds) like you"
    r"|thank(?:s| you) for (?:your|sharing|reaching|asking|bringing)|it's great (?:that|to hear)"
    r"|you are an? (?:helpful ai|ai assistant))\b",  # as system texts begin, which a small model may repeat
    re.IGNORECASE,
)
_ASSISTANT_PHRASES = re.compile(
    r"\b(?:as an ai|as a language model|hope this helps|is there anything else i can"
    r"|let me know if you (?:have|need|would)|feel free to (?:ask|reach)|would you like me to"
    r"|(?:do you|if you) have any (?:other|further|more|specific) questions|how (?:can|may) i (?:help|assist)"
    r"|i(?:'d| would) be (?:happy|glad) to (?:help|assist|provide|explain))\b",
    re.IGNORECASE,
)
_LIST_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+\S", re.MULTILINE)


def sounds_like_assistant(text: str) -> bool:
    """Whether a user's message reads as an answer, an assistant's opening or phrase or a long list, or as
    what an assistant is told.

    Figures against labelled turns are in docs/benchmarks.md.

    >>> sounds_like_assistant("Sure! Here are three ideas for dinner:")
    True
    >>> sounds_like_assistant("sounds good, but what about the rice?")
    False
    """
    opening = text.lstrip("\"'*# \n")
    if _ASSISTANT_OPENINGS.match(opening) and not opening.rstrip().endswith("?"):
        return True
    if _ASSISTANT_PHRASES.search(text):
        return True
    return "?" not in text and len(_LIST_ITEM.findall(text)) >= 3


def repeats(text: str, earlier: Sequence[str]) -> bool:
    """Whether a message says what an earlier one said (nearly the same words), or runs in a circle.

    >>> repeats("And what about the rice?", ["and what about the rice"])
    True
    >>> repeats("no no no " * 40, [])
    True
    """
    words = _count_words(text)
    return _runs_in_a_circle(text) or any(_alike(words, _count_words(other)) for other in earlier)


def find_repetition(texts: Sequence[str], *, least: int = 4) -> int | None:
    """The place of the first text that `repeats` one before it or runs in a circle, or None; texts of
    fewer words than `least` may come again.

    >>> find_repetition(["why?", "why?", "what does it cost there", "What does it cost there?"])
    3
    """
    earlier: list[Counter[str]] = []
    for place, text in enumerate(texts):
        words = _count_words(text)
        if _runs_in_a_circle(text):
            return place
        if words.total() >= least:
            if any(_alike(words, other) for other in earlier):
                return place
            earlier.append(words)
    return None


def _runs_in_a_circle(text: str) -> bool:
    data = text.encode("utf-8")
    return len(data) > 200 and len(data) > 6 * len(zlib.compress(data))


def _count_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _alike(one: Counter[str], other: Counter[str]) -> bool:
    """Whether nine words in ten are common to both (Dice coefficient of the bags of words)."""
    least = 0.45 * (one.total() + other.total())
    return min(one.total(), other.total()) >= least and (one & other).total() >= least


_FAREWELL = re.compile(
    r"\b(?:good ?bye|bye|farewell|see (?:you|ya)|take care|good ?night|talk to you (?:later|soon)"
    r"|have a (?:nice|great|good|wonderful|lovely) (?:day|one|evening|night|weekend|time)"
    r"|that(?:'s| is) all|(?:i have )?no (?:more|further|other) questions)\b",
    re.IGNORECASE,
)
_THANKS = re.compile(r"\b(?:thanks?|thank you|thx|cheers|appreciate)\b", re.IGNORECASE)
_FAREWELL_WORDS = 20


def says_farewell(messages: Sequence[Message]) -> bool:
    """Whether the dialogue is over: the user said goodbye, or only thanked twice running.

    To be asked after Chat's answer, so that the goodbye is answered.

    >>> says_farewell([Message("user", "ok thanks, bye!"), Message("assistant", "Goodbye!")])
    True
    """
    said = [message.content for message in messages if message.role == "user"][-2:]
    if not said:
        return False
    if _short(said[-1]) and _FAREWELL.search(said[-1]):
        return True
    return len(said) == 2 and all(_short(text) and _THANKS.search(text) for text in said)


def _short(text: str) -> bool:
    return "?" not in text and len(text.split()) <= _FAREWELL_WORDS
