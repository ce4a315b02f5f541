"""Whether a user's message leans on what was said before it, and whether it leaves the subject.

Both are rules over words, for English, that need no model. A message is *context-dependent* where a
stranger who read it alone could not tell what it means: anaphora, ellipsis, an answer to the
assistant's question. It is a *topic shift* where it leaves the subject of the exchange before it. How
well the rules agree with people's labels, and on what they fail, is in docs/data.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from parrot_edge.data.text import AUXILIARIES, COMMANDS, WH_WORDS, word_set, words_of
from parrot_edge.dialogue import Message

_WORDS = 40
"""Words of a message whose references are looked for throughout."""

_START = 12
"""Words at the start of a longer one in which they are looked for: what follows is mostly pasted, and
brings its antecedents along."""

_HISTORY = 4000
"""Characters of an answer that are compared with the message after it."""

_FRAGMENT, _NOUN_PHRASE = 4, 10
"""Words of the longest message that can be a fragment without a verb, and where it begins as a noun does."""


@dataclass(frozen=True)
class Links:
    """What ties a message to the history.

    dependent  it cannot be understood alone
    shift      it leaves the subject of the exchange before it
    """

    dependent: bool
    shift: bool


def find_links(history: Sequence[Message], text: str) -> Links:
    """How a user's message is tied to the messages before it; an opening is neither.

    >>> said = [Message("user", "who built the old bridge?"), Message("assistant", "A monk, in 1340.")]
    >>> find_links(said, "and how long did it take him?")
    Links(dependent=True, shift=False)
    >>> find_links(said, "Can you suggest a soup for tonight?")
    Links(dependent=False, shift=True)
    """
    turns = [message for message in history if message.role != "system"]
    if not any(message.role == "user" for message in turns):
        return Links(False, False)
    text = text[: 10 * _WORDS]
    start, last = _plain(text), turns[-1]
    words = start.split()
    is_long = len(words) > _WORDS
    body = _ACKNOWLEDGEMENTS.sub("", " ".join(words[:_START]) if is_long else start)
    own = _content(start)
    is_said_to_shift = bool(_SHIFTS.search(start))
    leans = (
        not is_said_to_shift
        and _is_english(start)
        and (
            not body
            or _points_back(body)
            or _has_free_pronoun(body, is_long)
            or _is_fragment(body)
            or _answers(body, last)
        )
    )
    refers = not leans and not _rephrases(own, turns) and _names_known_thing(text, _subjects(turns[-4:]))
    # A thing of an earlier exchange can be referred to in leaving the last one
    stays = leans or bool(own & _subjects(turns[-2:])) or len(own) < 2 or not _asks(body)
    leaves = not stays and not _REQUEST.search(_end(last))
    return Links(dependent=leans or refers, shift=leaves or is_said_to_shift)


def _points_back(text: str) -> bool:
    """Whether it refers to what was said, begins as a continuation, or adds to something."""
    return bool(_REFERENCES.search(text) or _CONTINUES.match(text) or _ADDS.search(text))


def _is_english(text: str) -> bool:
    """Whether the rules can say anything: a few words, or English ones among them."""
    found = words_of(text)
    return all(map(str.isascii, found)) and (len(found) <= 3 or any(word in _ENGLISH for word in found))


def _rephrases(own: set[str], turns: Sequence[Message]) -> bool:
    """Whether it is an earlier message of the user once more, in other words or about another thing."""
    earlier = (_subjects_of(turn.content[: 10 * _WORDS]) for turn in turns if turn.role == "user")
    return any(3 * len(own & other) > len(own | other) for other in earlier)


def _plain(text: str) -> str:
    """Lower case, straight quotes, single spaces."""
    return " ".join(text.lower().replace("’", "'").replace("“", '"').replace("”", '"').split())


_ACKNOWLEDGEMENTS = re.compile(
    r"^(?:(?:hm+|thanks?(?: you)?(?: so much| a lot| very much)?|great|ok(?:ay)?|cool|nice|perfect"
    r"|awesome|good"
    r"|wow|hi|hello|hey|please|oh|well|marvelous|excellent|wonderful|got it|interesting|alright|i see"
    r"|sounds (?:good|great|delicious)|(?:that|this)(?:'s| is| was| sounds) (?:a )?(?:great|good|interesting"
    r"|helpful|nice|delicious|awesome|cool)(?: \w+)?|chat ?gpt)[,.!?]*\s+)+"
)

_REFERENCES = re.compile(
    r"\b(?:above|previous(?:ly)?|prior|earlier|this time|further(?:more)?|use more|expand (?:it|on"
    r"|more)|aforementioned|so far|as before|original(?:ly)?"
    r"|you(?:'ve| have)? (?:just |also |already )?(?:said|mention(?:ed)?|wrote|written|gave|given"
    r"|provided|listed"
    r"|described|explained|suggested|recommended|brought|told|made|did|missed|forgot|call(?:ed)?|say)"
    r"|i(?:'ve| have)? (?:just |already )?(?:said|mentioned|told you|gave you|provided|meant)|i mean"
    r"|your (?:last |first |previous |final )?(?:answer|advice|response|reply|explanation|suggestions?"
    r"|list|code|example"
    r"|points?|summary|story|text|description|recommendations?|version|output|message)"
    r"|(?:first|second|third|fourth|fifth|last|latter|former|next|most recent) (?:one|point|option"
    r"|paragraph|item"
    r"|part|line|sentence|step|question|example|version|script|two|three|answer|message|time)"
    r"|(?:points?|items?|steps?|options?|parts?)(?: number| #)? ?\d|on \d(?: and \d)?|here\?"
    r"|we(?:'ve| have)? (?:just )?(?:discussed|talked|said)|in (?:this|that) (?:case|context)"
    r"|still|did(?:n't| not) (?:help|work)|do(?:es)?(?:n't| not) work|not working|it worked)\b"
)

_CONTINUES = re.compile(
    r"(?:and|but|also|or|so|then|now|next|finally|yes|yeah|yep|yup|no|nope|sure|really|wait|actually"
    r"|what about|how about|what if|why not|in that case|instead|again|sorry|regarding|based on|considering"
    r"|building on|you (?:did|didn't|are|were|forgot|should)|are you (?:sure|certain|rly)|i still|go on"
    r"|continue|keep going|more|try|explain more|tell me more|expand|elaborate|shorten|summari[sz]e$"
    r"|rephrase$"
    r"|why|how so|how come|like what|such as|which (?:one|of|is|are|was|would|do)|start over|who else"
    r"|what else|where else|let's (?:add|say))\b(?!-)"
)

_ADDS = re.compile(
    r"\b(?:(?:any|some|the|are|there|give(?: me)?|list|tell me|suggest) (?:other|others|more|further"
    r"|additional)"
    r"|another(?! (?:day|time|person|country))|instead|again|both|the same|(?:as well|too"
    r"|either)(?=[.?!]|$)|likewise|else|(?:i|we)(?: \w+|'\w+)? also"
    r"|(?:simpler|shorter|longer|better|funnier|clearer|more \w+) (?:version|one|way|format|form"
    r"|language|terms)"
    r"|the (?:only|other) (?:one|ones|\w+s)|(?:first|last|next) one|all of (?:them|these|those)"
    r"|one of (?:them|these|those)|(?:each|either|neither|none|any|some|most|which) (?:one(?! of)"
    r"|of (?:them|these|those)))\b"
)

_PRONOUN = re.compile(
    r"\b(?:(?P<pronoun>it|its|it's|they|they're|them|their|he|he's|she|she's|him|his|her|hers|ones)"
    r"|(?P<determiner>this|these|those|that"
    r"|such)(?P<noun>(?:'s)?(?: [\w'-]+)?(?: [\w'-]+)?)(?P<after>[^\w ]?))\b"
    r"|\b(?P<end>this|that|these|those)(?=$|[.,?!;])"
)
_TIMES = word_set("year month week morning afternoon evening time summer winter spring fall day way")
_AFTER_THAT = word_set(
    """in into to as for with using on out up down again too more is was be sound sounds mean means work works
    seem seems seem's seems's does would will could can happen happens affect affects information
    explanation analogy answer list idea summary story part point metaphor case question sentence paragraph
    text response insight advice process same article code message theory concept era period by at really
    actually always necessarily also important true correct right possible good bad different related and
    or from because if when since high low"""
)
_COMPLEMENT = word_set(
    """heard said told think know believe say see so such find found show shows ensure fact way ways mean
    means sure given assume assuming provided one all thing things foods people ones everything something
    anything read learned noticed mentioned stating says saying knowing claim claims prove remember hope
    wish feel feels suppose told you me is are"""
)


def _has_free_pronoun(text: str, is_long: bool) -> bool:
    """Whether it has a pronoun that nothing before it in the text could be meant by; what "this" and
    "these" announce in a long message follows there."""
    for match in _PRONOUN.finditer(text):
        before = text[: match.start()]
        named = _content(before)
        determiner = match["determiner"]
        if determiner == "that":
            if _is_demonstrative(before.split()[-1:], match["noun"].split()[:1]):
                return True
        elif determiner == "such":
            if match["noun"] and _BEFORE_SUCH.search(before) and match["noun"].split()[0] not in _AFTER_SUCH:
                return True
        elif determiner:
            following = match["noun"].removeprefix("'s").split()
            is_time = bool(following) and following[0] in _TIMES
            announces = is_long or _ANNOUNCES.match(text, match.end("determiner"))
            if not is_time and not announces and not set(map(_stem, following)) & named:
                return True
        elif not _EXPLETIVE.match(text, match.start()) and len(named) < _ANTECEDENTS:
            return True
    return False


def _is_demonstrative(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether a "that" between these words points at something, rather than begins a clause."""
    if not before:
        return True
    return before[0] in _BEFORE_THAT or (before[0] not in _COMPLEMENT and bool(set(after) & _AFTER_THAT))


_ANTECEDENTS = 3
"""Words of content before a pronoun from which on it is taken to have its antecedent among them."""

_ANNOUNCES = re.compile(r"[^.?!]{0,60}?(?::|\"|')(?=\s)")
_BEFORE_SUCH = re.compile(r"\b(?:with|in|of|for|and|the|are|from)\s*$")
_AFTER_SUCH = word_set("a an as that")
_BEFORE_THAT = word_set(
    """do does did is was of for with about to in on summarize summarise rewrite rephrase explain can could
    would will make turn put provide translate like present simplify present and but if than by from at
    isn't doesn't wasn't change use try shorten convert expand"""
)
_EXPLETIVE = re.compile(
    r"(?:it|it's)(?: is| was| would be| be)? (?:possible|okay|ok|safe|true|normal|necessary|important"
    r"|better|legal"
    r"|that|to|raining|hard|easy|worth|time|seems|appears)\b"
)

_SENTENCES = (
    WH_WORDS
    | AUXILIARIES
    | word_set(
        """i i'm i've i'd i'll we we're we've you your my if there there's let's please what's who's how's
        where's when's equals"""
    )
)


def _is_fragment(text: str) -> bool:
    """Whether it is a few words without a verb, as far as its first word tells: "Potato chips.", "Why?"."""
    found = words_of(text)
    if not found or not found[0].isascii():
        return False
    if len(found) <= 2 and found[0] not in COMMANDS:
        return True
    longest = _NOUN_PHRASE if found[0] in _ARTICLES else _FRAGMENT
    return (
        len(found) <= longest and found[0] not in COMMANDS and not any(word in _SENTENCES for word in found)
    )


_ARTICLES = word_set("the a an my your his her their our this these")
_ENGLISH = _SENTENCES | COMMANDS | word_set("the an of to and in it that this with from for by not")

_REQUEST = re.compile(
    r"\?|\bplease (?:tell|provide|specify|share|give|let me know|send|paste|describe|enter)", re.IGNORECASE
)
_OFFER = re.compile(r"\b(?:assist|help)\b(?: you)?[^?]*\?\s*$", re.IGNORECASE)


def _end(message: Message) -> str:
    return message.content[-300:]


def _answers(text: str, last: Message) -> bool:
    """Whether it says something where the assistant had asked for it."""
    return not _asks(text) and bool(_REQUEST.search(_end(last))) and not _OFFER.search(_end(last))


def _asks(text: str) -> bool:
    """Whether it asks for something: a question or a command."""
    return (
        "?" in text
        or words_of(text[:40])[:1] == []
        or words_of(text[:40])[0] in COMMANDS | WH_WORDS | AUXILIARIES
    )


_SHIFTS = re.compile(
    r"\b(?:(?:switch|chang|shift)(?:e|ing)?(?: the| to another| gears)? ?(?:topics?|subjects?|gears)"
    r"|before i forget"
    r"|on (?:a|an) (?:different|another|unrelated|separate|side) (?:note|topic|subject)|off[- ]topic"
    r"|unrelated"
    r"|(?:different|another|new) (?:topic|subject)|random question)\b"
)

_PREPOSITIONS = "of|between|that|which|who|from|in|for|to|about|on|with|at"
_KNOWN = re.compile(
    r"\b[Tt]he (?!\w+est\b|most|following|first|next|world|internet)[a-z][\w'-]*"
    rf"(?: (?!(?:{_PREPOSITIONS})\b)[a-z][\w'-]*)?+(?! (?:of|between|that|which|who|from)\b)"
)


def _names_known_thing(text: str, known: frozenset[str]) -> bool:
    """Whether it has a definite noun, no name, that the history introduced and the text itself did not."""
    for match in _KNOWN.finditer(text):
        nouns = {_stem(word) for word in words_of(match[0]) if word not in _COMMON}
        if nouns & known - _content(text[: match.start()]):
            return True
    return False


def _subjects(messages: Sequence[Message]) -> frozenset[str]:
    return frozenset().union(*(_subjects_of(message.content[:_HISTORY]) for message in messages))


@lru_cache(maxsize=256)  # a message is looked at again for some turns
def _subjects_of(text: str) -> frozenset[str]:
    return frozenset(_content(_plain(text)))


def _content(text: str) -> set[str]:
    """Stems of the words that say what a text is about."""
    return {_stem(word) for word in words_of(text) if len(word) > 2 and word not in _COMMON}


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """A word without the commonest English endings: enough to match "movies" with "movie".

    >>> _stem("movies"), _stem("movie"), _stem("investing"), _stem("invested")
    ('mov', 'mov', 'invest', 'invest')
    """
    for ending in ("'s", "ings", "ing", "ies", "ied", "ie", "ed", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            return word[: -len(ending)]
    return word


_COMMON = word_set(
    """the and for are but not you all any can had her was one our out his has him how its who did get may she
    use that with have this will your from they know want been good much some time very when come here just
    like long make many more only over such take than them well were what about after again also another
    because before being between both could does doing down during each few first give going into made most
    must need now off once other please really said same say should show since still tell than their then
    there these thing things think those through too under until upon using way ways where which while whom
    why would yes yet best better great help question answer explain example examples list write let lets
    lot kind sort sure something anything someone able different important number part people person
    provide suggest recommend recommendation recommendations information word words work works used new old
    two three long short right look looking mean means find found keep feel try trying might shall ever
    never always often usually around without within against per via got i'm i've i'd it's that's what's
    don't doesn't isn't can't didn't you're there's how's who's let's thanks thank create describe discuss
    everyone every day today year years currently main specific generally typically certainly course based
    including include includes various several however interested interesting heard curious tips idea ideas
    favorite start add called name names"""
)
