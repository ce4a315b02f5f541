"""Context-aware preference pairs: a turn answered with its history, and answered without what it leans on.

CaPO (arXiv 2310.07301v2) takes a user's message that cannot be understood alone, prefers the answer to
the whole history, and rejects three kinds of answer that miss it. Each kind is made by the same model,
from other messages: what it is shown is the only difference, so what DPO can learn is to use the history.

neglect           the message alone
hallucination     the message alone, and what it might be about, which the model itself made up
misunderstanding  the message after the history of another dialogue

How the model is brought to make something up, and when a pair is dropped, is our choice; docs/data.md
has the reasons. It knows engines only by what `roles` says of them, and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parrot_edge.data.context import find_links
from parrot_edge.data.curate import stops_in_the_middle
from parrot_edge.data.diversity import find_rouge_l
from parrot_edge.data.text import words_of
from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Request, Session
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.roles import ATTEMPTS, Speaker, say_as_chat

KINDS = ("neglect", "hallucination", "misunderstanding")

REASONS = {
    "chosen cut": "the answer to the whole history stops in the middle",
    "chosen repetition": "the answer to the whole history is empty, or says again what was said",
    "chosen context": "the whole history does not fit the model's context",
    "rejected cut": "the other answer stops in the middle",
    "rejected repetition": "the other answer is empty, or runs in a circle",
    "rejected context": "what was to be answered does not fit the model's context",
    "alike": "the two answers say nearly the same",
    "no subject": "nothing was made up that it could be about",
    "no other dialogue": "there is no other dialogue whose history could stand in its place",
}
"""Why there is no pair."""

ALIKE = 0.7
"""ROUGE-L (F1) of two answers from which on they say nearly the same."""

_GUESS_TOKENS = 32
"""Of what a message might be about: a sentence."""

_QUESTION = "Sorry, what are you talking about? Please name it."
_TASK = (
    "Somebody says this in the middle of a conversation that you have not seen:\n\n{message}\n\n"
    "Make up what it is about: one particular thing, named. Write one short sentence in that person's "
    'words, such as "I am talking about ...", and nothing else.'
)


@dataclass(frozen=True)
class Turn:
    """A user's message that leans on what was said before it.

    dialogue  id of its dialogue
    number    of the user's messages of the dialogue; the opening is 1
    history   the messages before it; a system message may lead
    answer    what the dialogue has as its answer, or None
    """

    dialogue: str
    number: int
    history: tuple[Message, ...]
    message: Message
    answer: Message | None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The whole history, ending with the message."""
        return (*self.history, self.message)

    @property
    def system(self) -> tuple[Message, ...]:
        """The system message, if there is one: it is no history, and stands in every prompt."""
        return self.history[:1] if self.history[0].role == "system" else ()

    def pair_id(self, kind: str) -> str:
        """`DIALOGUE:NUMBER:KIND`: the id of its pair of a kind."""
        return f"{self.dialogue}:{self.number}:{kind}"


@dataclass(frozen=True)
class Answer:
    """What the model said, or in `fault` why that cannot be used: "cut", "repetition" or "context".

    `made` counts tokens.
    """

    text: str
    fault: str | None = None
    made: int = 0


def find_turns(dialogue: Seed) -> list[Turn]:
    """The context-dependent user messages after the opening, by the rules of `data.context`."""
    messages, turns, number = dialogue.messages, [], 0
    for place, message in enumerate(messages):
        if message.role != "user":
            continue
        number += 1
        history = messages[:place]
        if number > 1 and find_links(history, message.content).dependent:
            answer = messages[place + 1] if place + 1 < len(messages) else None
            turns.append(Turn(dialogue.id, number, history, message, answer))
    return turns


def opening_of(dialogue: Seed) -> str | None:
    """The first user message: dialogues that share it are not taken for unlike ones."""
    return next((message.content for message in dialogue.messages if message.role == "user"), None)


def replace_history(turn: Turn, other: Seed) -> list[Message]:
    """The message after the history of another dialogue, at most as many messages of it as its own had."""
    turns = [message for message in other.messages if message.role != "system"]
    most = min(len(turns), len(turn.history) - len(turn.system)) // 2 * 2  # whole exchanges
    return [*turn.system, *turns[:most], turn.message]


async def make_up_subject(chat: Speaker, session: Session, turn: Turn, run_seed: int) -> Answer:
    """What the message might be about, as its writer could have said: a sentence, or "" after three tries.

    Told to guess, a small model talks about guessing. Asked back what is meant, and writing as the user
    on whom the question falls, it names something; an engine that only answers is told to.
    """
    if chat.engine.writes_any_role:
        view, role = [turn.message, Message("assistant", _QUESTION)], "user"
    else:
        view, role = [Message("user", _TASK.format(message=turn.message.content))], "assistant"
    text, made = "", 0
    for attempt in range(ATTEMPTS):
        reply = await session.reply(
            Request(
                view,
                role,
                max_tokens=min(_GUESS_TOKENS, chat.max_tokens),
                sampling=chat.sampling,
                stop=("\n",),
                seed=derive_seed(run_seed, turn.dialogue, turn.number, "subject", attempt),
            )
        )
        text, made = reply.text.strip(), made + reply.completion_tokens
        if text:
            break
    return Answer(text, made=made)


async def answer_turn(
    chat: Speaker, session: Session, view: Sequence[Message], turn: Turn, kind: str, run_seed: int
) -> Answer:
    """Chat's answer to what it is shown in place of the turn's history, drawn for this turn and kind."""
    said = await say_as_chat(chat, session, Seed(turn.pair_id(kind)), view, run_seed)
    return Answer(said.text, said.stop_reason or ("cut" if said.cut else None), said.made)


def recorded_answer(turn: Turn) -> Answer | None:
    """The answer that the dialogue has, or None."""
    if turn.answer is None:
        return None
    text = turn.answer.content.strip()
    return Answer(text, "cut" if stops_in_the_middle(text) else None)


async def show_instead(
    chat: Speaker, session: Session, turn: Turn, kind: str, other: Seed | None, run_seed: int
) -> tuple[list[Message] | str, int]:
    """What Chat is shown for a kind, or which of `REASONS` it cannot be; and the tokens made for that."""
    if kind == "neglect":
        return [*turn.system, turn.message], 0
    if kind == "misunderstanding":
        return replace_history(turn, other) if other else "no other dialogue", 0
    subject = await make_up_subject(chat, session, turn, run_seed)
    if not subject.text:
        return "no subject", subject.made
    told = Message("user", f"{subject.text}\n\n{turn.message.content}")
    return [*turn.system, told], subject.made


def find_fault(chosen: Answer, rejected: Answer) -> str | None:
    """Why two answers are no pair: one of `REASONS`, or None.

    >>> find_fault(Answer("It took him nine years."), Answer("It took him nine years!"))
    'alike'
    """
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer.fault:
            return f"{name} {answer.fault}"
    one, other = words_of(chosen.text), words_of(rejected.text)
    same = chosen.text == rejected.text if not (one or other) else find_rouge_l(one, other) >= ALIKE
    return "alike" if same else None


def make_row(
    turn: Turn, kind: str, chosen: Answer, rejected: Answer, shown: Sequence[Message], facts: dict[str, Any]
) -> dict[str, Any]:
    """A pair as trl's DPO reads it, with where it comes from and what Chat was shown for the rejected one."""
    return {
        "id": turn.pair_id(kind),
        "prompt": [message.as_dict() for message in turn.prompt],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "kind": kind,
        "dialogue": turn.dialogue,
        "turn": turn.number,
        "rejected_prompt": [message.as_dict() for message in shown],
        **facts,
    }
