"""What leans on the context and what leaves the subject. Every sentence was written for these tests."""

import pytest

from parrot_edge.data.context import find_links
from parrot_edge.data.questions import find_question_type
from parrot_edge.data.role import find_assistant_likeness
from parrot_edge.dialogue import Message

BREAD = (
    Message("user", "how long does a sourdough loaf have to rise?"),
    Message("assistant", "Overnight in a cool kitchen. The dough should double, and the crumb gets airy."),
)
ASKED = (
    Message("user", "Which tyre should I buy for my bike?"),
    Message("assistant", "That depends on where you ride. Could you tell me which roads you use most?"),
)


@pytest.mark.parametrize(
    "text",
    [
        "and if it is too cold?",
        "Why?",
        "What about rye flour?",
        "could you put that in a table",
        "tell me more",
        "does the dough stick to the bowl then?",
        "You said overnight, is six hours enough?",
        "Are there other ways?",
        "make it shorter please",
        "ok thanks",
    ],
)
def test_anaphora_and_ellipsis_lean_on_the_context(text):
    assert find_links(BREAD, text).dependent


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of Mongolia?",
        "Write a poem about a lighthouse keeper and his cat.",
        "How do I remove a red wine stain from a white cotton shirt?",
        "My sister moved to Oslo and she wants to learn skiing, where should she start?",
        "Summarize this email: Dear Sir, the delivery came too late. Regards, Ann",
    ],
)
def test_a_message_that_stands_alone_leaves_the_subject(text):
    links = find_links(BREAD, text)
    assert not links.dependent
    assert links.shift


def test_a_follow_up_about_the_same_thing_is_no_shift():
    links = find_links(BREAD, "How much salt goes into a sourdough loaf of one kilo?")
    assert (links.dependent, links.shift) == (False, False)


def test_an_answer_to_the_assistants_question_leans_on_it():
    assert find_links(ASKED, "I mostly ride on gravel near the river.").dependent
    assert not find_links(ASKED, "I mostly ride on gravel near the river.").shift


def test_a_shift_may_be_said():
    assert find_links(BREAD, "Switching topics, how long does dough keep in the freezer?").shift


def test_an_opening_is_neither():
    assert find_links((), "and it?") == find_links((Message("system", "Be brief."),), "and it?")
    assert not find_links((), "and it?").dependent


@pytest.mark.parametrize(
    "text", ["", "???", "\u202eabc", "🦜" * 50, "和那个怎么样", "a" * 100_000, "it " * 50_000]
)
def test_strange_text_is_measured(text):
    find_links(BREAD, text)
    assert find_question_type(text)
    assert 0 <= find_assistant_likeness(text) <= 1


def test_an_answer_looks_like_an_assistants_and_a_question_does_not():
    answer = "Sourdough is a bread that rises with wild yeast. The dough is fed with flour, which takes time."
    assert find_assistant_likeness(answer) > 0.5
    assert find_assistant_likeness("can i use my old pan for this?") < 0.2
