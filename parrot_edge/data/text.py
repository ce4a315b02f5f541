"""Words of a text, as every measure of the data counts them."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(text: str) -> list[str]:
    """The words in lower case; an apostrophe inside belongs to its word.

    >>> words_of("Don't re-use it: 3 times!")
    ["don't", 're', 'use', 'it', '3', 'times']
    """
    return _WORD.findall(text.lower())


def word_set(text: str) -> frozenset[str]:
    """A set of words, written one after the other."""
    return frozenset(text.split())


WH_WORDS = word_set("what who whom whose when where why how which")

AUXILIARIES = word_set(
    "is are am was were do does did can could will would should shall may might must has have had"
    " isn't aren't don't doesn't didn't can't won't shouldn't couldn't wouldn't"
)

COMMANDS = word_set(
    """write tell give make explain list create describe show find help generate provide suggest recommend
    design discuss compare define calculate solve translate rewrite summarize summarise analyze analyse
    name prove compose draft outline imagine act pretend convert fix add remove change use build implement
    develop evaluate identify read say teach choose pick plan answer apply edit improve integrate correct
    consider feedback optimize come do get let put play run set think check turn send draw simplify
    rephrase mention determine"""
)
"""Verbs that a request begins with."""
