"""Writes down what a trained model says, as a `reference`; the torch side of the certificate.

It reads the same tokens as training did (`train.data`), through the same forward pass (`train.loops`),
over the base as it was trained on: so whatever differs later was brought in later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

import parrot_edge
from parrot_edge.convert import reference
from parrot_edge.convert.reference import ANCHORS, HARD_DIALOGUES, Passage, Reference, Text
from parrot_edge.data.sources import Dialogue, Reader, is_held_out
from parrot_edge.dialogue import Message, content_id, parse_seed
from parrot_edge.errors import InputError, OutputError
from parrot_edge.jsonl import Line, read_lines
from parrot_edge.machine import plural
from parrot_edge.recipe import DataOptions
from parrot_edge.seeds import builtin_path
from parrot_edge.store import refuse_existing, write_json
from parrot_edge.train.data import CONTEXT, LEARNED, Encoder, Row, split_row
from parrot_edge.train.template import TurnTemplate, Unwritable

if TYPE_CHECKING:
    from parrot_edge.convert.trained import Trained

_FEW = 5  # dialogues; the bootstrap draws from them
_AT_ONCE = 64  # rows of logits that are normalised together, 4 bytes a token of the vocabulary each


@dataclass(frozen=True)
class Extent:
    """How much of what a trained model says is written down.

    tokens    of dialogues, about
    longest   tokens of one dialogue; of a longer one its beginning is taken
    places    at which the probability of every token is kept, at 2 bytes each
    anchored  of these, also with none and with twice of the adapter
    prompts   that are continued
    made      tokens of a continuation, at most
    """

    tokens: int = 8000
    longest: int = 1024
    places: int = 1024
    anchored: int = 96
    prompts: int = 4
    made: int = 40


def write_reference(
    trained: Trained,
    target: Path,
    sources: Sequence[str] = (),
    *,
    extent: Extent | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Reference:
    """Write what `trained` says to the dialogues of `sources` into the folder `target`, and read it back.

    sources  as `parrot train` reads them; of these, what its recipe has kept back. Without any, the
             package's seeds are openings and the model's own likeliest answers follow.
    extent   how much; the default where it is None

    Raises `OutputError` where `target` exists without `force` or cannot be written, and `InputError`
    where the sources hold nothing for the role.
    """
    refuse_existing(target, force=force)
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _Listener(trained, extent or Extent(), say).write(partial, sources)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror}; free some space or name another place"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return reference.read_reference(target)


class _Listener:
    """Asks a trained model for all that a reference holds."""

    def __init__(self, trained: Trained, extent: Extent, say: Callable[[str], None]) -> None:
        self._trained, self._extent, self._say = trained, extent, say
        self._tokenizer: Any = trained.tokenizer
        longest = getattr(trained.shape, "max_position_embeddings", extent.longest)
        data = trained.recipe.data if trained.record else DataOptions()
        self._options = replace(
            data,
            sources=(),
            shorten=0,
            turn_tokens=0,
            max_length=min(data.max_length, extent.longest, longest),
        )
        self._longest = self._options.max_length
        self._template = TurnTemplate(self._tokenizer, system=data.system, system_text=data.system_text)
        self._role = trained.role or "chat"
        self._learned = LEARNED[self._role]
        added = self._tokenizer.added_tokens_decoder
        self._control = sorted(token for token, each in added.items() if each.special)
        prompt = self._template.prompt
        self._ends = {"user": self._encode(prompt.user_end), "assistant": self._encode(prompt.assistant_end)}

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def write(self, folder: Path, sources: Sequence[str]) -> None:
        """All files of a reference."""
        trained, missing = self._trained, list[str]()
        if sources:
            dialogues, remark = self._held_out(sources)
            missing += [remark] if remark else []
        else:
            dialogues = self._make_up()
            missing.append(
                "No dialogues were given, so the texts are the trained model's own words: the perplexity "
                "of real turns and the ends of dialogues are not measured; name dialogues with --data."
            )
        texts = [text for text in map(self._hard_text, HARD_DIALOGUES) if text]
        texts += [self._text_of(dialogue.messages, hard=False) for dialogue in dialogues]
        passages = self._lay_out(dialogues)
        if not passages:
            raise InputError(
                f"there is nothing that {trained.folder.name} could be heard to say as {self._role}; name "
                "(other) dialogues with --data"
            )
        groups = len({passage.group for passage in passages})
        if sources and groups < _FEW:
            missing.append(f"The intervals tell little: they rest on {plural(groups, 'dialogue')} alone.")
        self._say(f"what {trained.folder.name} says to {sum(len(p.tokens) for p in passages)} tokens")
        with open(folder / "log_probs.f16", "wb") as rows, open(folder / "anchors.f16", "wb") as anchors:
            passages, size, anchored = self._hear(passages, rows, anchors)
        write_json(folder / "vocabulary.json", self._vocabulary())
        prompts = self._prompts(dialogues)
        write_json(
            folder / "reference.json",
            {
                "format": reference.FORMAT,
                "name": trained.folder.resolve().name,
                "role": trained.role,
                "facts": self._facts(),
                "closing": {role: tokens[0] for role, tokens in self._ends.items()},
                "control": self._control,
                "eos": self._tokenizer.eos_token_id,
                "invocation": trained.invocation,
                "made_up": not sources,
                "missing": missing,
                "logits": size,
                "rows": int(sum((passage.rows >= 0).sum() for passage in passages)),
                "anchored": anchored,
                "texts": [
                    {**vars(text), "messages": [list(vars(m).values()) for m in text.messages]}
                    for text in texts
                ],
                "passages": [passage.as_dict() for passage in passages],
                "continuations": [
                    {
                        "messages": [list(vars(m).values()) for m in self._template.as_prompted(history)],
                        "next_role": role,
                        "text": self._continue(history, role),
                        "length": len(self._prompt_tokens(history, role)),
                        "limit": self._extent.made,
                    }
                    for history, role in prompts
                ],
            },
        )

    def _facts(self) -> dict[str, Any]:
        trained = self._trained
        identity = trained.record.get("base") or trained.base.identity(trained.shape)
        return {
            "base": identity,
            "license": trained.recipe.license if trained.record else "",
            "quantization": trained.recipe.base.quantization,
            "dtype": str(trained.dtype).removeprefix("torch."),
            "parrot_edge": parrot_edge.__version__,
            "versions": trained.record.get("versions", {}),
        }

    def _vocabulary(self) -> list[str | None]:
        count = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        return self._tokenizer.convert_ids_to_tokens(list(range(count)))

    # Which dialogues

    def _held_out(self, sources: Sequence[str]) -> tuple[list[Dialogue], str]:
        """Dialogues that training kept back, as many as are wanted, and a remark where they were not."""
        reader = Reader(sources, skip=True)
        with contextlib.closing(reader.dialogues()) as found:
            dialogues = [dialogue for dialogue in found if self._teaches(dialogue)]
        if not dialogues:
            raise InputError(
                f"{', '.join(sources)}: holds nothing that the {self._role} role says "
                f"({reader.first_error or 'no such turns'}); name other dialogues with --data"
            )
        share = self._options.held_out if self._trained.record else 1.0
        kept = [dialogue for dialogue in dialogues if is_held_out(dialogue, share)]
        remark = ""
        if not kept or not self._trained.record:
            remark = (
                "Nothing tells that the dialogues were kept back from training, so the perplexities may be "
                "those of texts that were learned."
            )
        chosen, total = list[Dialogue](), 0
        for dialogue in _by_turns(kept or dialogues):
            if total >= self._extent.tokens:
                break
            chosen.append(dialogue)
            text, _ = self._template.render(dialogue.messages)
            total += min(len(self._encode(text)), self._longest)
        return chosen, remark

    def _teaches(self, dialogue: Dialogue) -> bool:
        """Whether the role says something in what would be read of a dialogue."""
        try:
            self._template.render(dialogue.messages)
            return any(message.role == self._learned for message in dialogue.messages)
        except Unwritable:
            return False

    def _make_up(self) -> list[Dialogue]:
        """Dialogues that start with the package's seeds and go on with the model's likeliest words."""
        dialogues = []
        for line in read_lines(builtin_path()):
            history = parse_seed(line).messages
            for role in ("assistant", "user")[: 2 if self._learned == "user" else 1]:
                text = self._continue(history, role).strip() if history else ""
                history = (*history, Message(role, text)) if text else ()
            dialogue = Dialogue(history, None, False, Line("seeds", line.number, b""))
            if history and self._teaches(dialogue):
                dialogues.append(dialogue)
            if len(dialogues) >= max(8, self._extent.prompts):
                break
        return dialogues

    def _hard_text(self, messages: tuple[Message, ...]) -> Text | None:
        """A hard dialogue, or None where the template cannot write it: then it was never trained on."""
        try:
            return self._text_of(messages, hard=True)
        except Unwritable:
            return None

    def _text_of(self, messages: tuple[Message, ...], *, hard: bool) -> Text:
        text, spans = self._template.render(messages)
        prompted = tuple(self._template.as_prompted(messages))
        return Text(prompted, text, tuple(span.start for span in spans), tuple(self._encode(text)), hard)

    def _prompts(self, dialogues: Sequence[Dialogue]) -> list[tuple[tuple[Message, ...], str]]:
        """Histories of the first dialogues, up to where the role speaks, and its place in the template."""
        prompts = list[tuple[tuple[Message, ...], str]]()
        for dialogue in dialogues:
            roles = [message.role for message in dialogue.messages]
            places = [at for at, role in enumerate(roles) if role == self._learned and "user" in roles[:at]]
            for at in reversed(
                places[: len(places) // 2 + 1]
            ):  # the middle, or before where that is too long
                history = dialogue.messages[:at]
                if len(self._prompt_tokens(history, self._learned)) + self._extent.made <= self._longest:
                    prompts.append((history, self._learned))
                    break
            if len(prompts) == self._extent.prompts:
                break
        return prompts

    def _prompt_tokens(self, history: Sequence[Message], role: str) -> list[int]:
        text, spans = self._template.render([*history, Message(role, "text")])
        return self._encode(text[: spans[-1].start])

    # What it says

    def _lay_out(self, dialogues: Sequence[Dialogue]) -> list[Passage]:
        """The dialogues as tokens with their targets, as training has them; nothing is known of these yet."""
        other_role = "chat" if self._role == "ask" else "ask"
        own = Encoder(self._template, self._tokenizer, self._role, self._options)
        other = Encoder(self._template, self._tokenizer, other_role, self._options)
        passages = []
        for dialogue in dialogues:
            row, turns = own.encode(dialogue)
            try:
                parts = split_row(row, turns, self._longest)
            except Unwritable:  # too long an opening
                continue
            if not parts:
                continue
            tokens = parts[0].input_ids
            mine = parts[0].labels != CONTEXT
            others = other.encode(dialogue)[0].labels[: len(tokens)] != CONTEXT
            if self._trained.invocation:  # what the base says is no news
                others = np.zeros_like(others)
            kinds = np.full(len(tokens), reference.TEXT)
            for number, turn in enumerate(turns):
                end = turn.end - len(self._ends["assistant" if number % 2 else "user"])
                if end < len(tokens):
                    kinds[end] = reference.DIALOGUE_END if end == turn.text else reference.TURN_END
            places = np.flatnonzero(mine | others)
            unknown = np.full(len(places), -1)
            passages.append(
                Passage(
                    dialogue.group,
                    tokens.tolist(),
                    places,
                    mine[places],
                    kinds[places],
                    unknown * 1.0,
                    unknown,
                )
            )
        return passages

    def _hear(
        self, passages: Sequence[Passage], rows: BinaryIO, anchors: BinaryIO
    ) -> tuple[list[Passage], int, int]:
        """The passages with what the model says to them, the size of its vocabulary, and how many anchors."""
        from parrot_edge.train import loops

        total = sum(int(passage.own.sum()) for passage in passages)
        every = max(1, -(-total // self._extent.places))
        heard, count, seen, size = list[Passage](), 0, 0, 0
        anchored: list[list[np.ndarray]] = [[] for _ in ANCHORS]
        with loops.evaluating(self._trained.model):
            for passage in passages:
                places, values = self._log_probs(passage)
                passage = _at(passage, places)
                size = values.shape[1]
                numbers = seen + np.cumsum(passage.own) - 1  # of the role's targets, over all passages
                seen += int(passage.own.sum())
                listed = np.flatnonzero(passage.own & (numbers % every == 0))
                values[listed].astype(np.float16).tofile(rows)
                if (held := sum(map(len, anchored[0]))) < self._extent.anchored:
                    for part, factor in zip(anchored, ANCHORS, strict=True):
                        with _scaled(self._trained.model, factor):
                            some = self._log_probs(passage)[1][listed]
                        part.append(some[: self._extent.anchored - held].astype(np.float16))
                log_probs = values[np.arange(len(places)), np.asarray(passage.tokens)[places]]
                where = np.full(len(places), -1)
                where[listed] = count + np.arange(len(listed))
                count += len(listed)
                heard.append(replace(passage, log_probs=log_probs.astype(np.float64), rows=where))
        for part in anchored:
            np.concatenate(part).tofile(anchors)
        return heard, size, sum(map(len, anchored[0]))

    def _log_probs(self, passage: Passage) -> tuple[np.ndarray, np.ndarray]:
        """The places of the targets that are predicted, (N,), and ln P of all tokens there, (N, V)."""
        import torch

        from parrot_edge.train import loops

        ids = np.asarray(passage.tokens, np.int32)
        labels = np.full_like(ids, CONTEXT)
        labels[passage.places] = ids[passage.places]
        batch = loops.lay_out([loops.to_record([Row(ids, labels, "")], self._trained.invocation)])
        device = self._trained.model.device
        batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        with torch.no_grad():
            logits, places = loops.target_logits(self._trained.model, batch)
            parts = [torch.log_softmax(part.float(), -1).cpu().numpy() for part in logits.split(_AT_ONCE)]
        return places.cpu().numpy(), np.concatenate(parts)

    def _continue(self, history: Sequence[Message], role: str) -> str:
        """What the model writes next as `role`, without what closes the turn."""
        from parrot_edge.train import loops

        tokens = self._prompt_tokens(history, role)
        with loops.evaluating(self._trained.model):
            made = self._write_on(tokens, self._extent.made, {*self._control, self._ends[role][0]})
        return self._tokenizer.decode(made).replace("\ufffd", "")  # the engine drops cut characters too

    def _write_on(self, tokens: list[int], count: int, stops: set[int]) -> list[int]:
        """The likeliest next tokens, one after the other, up to one of `stops`."""
        import torch

        model: Any = self._trained.model
        active = _find_last(tokens, self._trained.invocation)
        cache, made = None, list[int]()

        def read(ids: list[int], start: int) -> int:
            nonlocal cache
            stop = start + len(ids)
            said = model(
                input_ids=torch.tensor([ids], device=model.device),
                position_ids=torch.arange(start, stop, device=model.device)[None],
                cache=cache,
                use_cache=True,
                turns=[(0, start, stop)],
                logits_to_keep=1,
            )
            cache = said.cache
            return int(said.logits[0, -1].argmax())

        with torch.no_grad():
            if active:
                with model.disable_adapter():
                    read(tokens[:active], 0)
            following = read(tokens[active:], active)
            while following not in stops:
                made.append(following)
                if len(made) >= count:
                    break
                following = read([following], len(tokens) + len(made) - 1)
        return made


def _by_turns(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """In an order that depends on what they are alone: one of each group, then another one of each."""
    shuffled = sorted(dialogues, key=lambda d: content_id([d.group, d.line.number]))
    before, rounds = Counter[str](), list[int]()
    for dialogue in shuffled:
        rounds.append(before[dialogue.group])
        before[dialogue.group] += 1
    return [dialogue for _, dialogue in sorted(zip(rounds, shuffled, strict=True), key=lambda pair: pair[0])]


def _at(passage: Passage, places: np.ndarray) -> Passage:
    """A passage with those targets alone."""
    kept = np.isin(passage.places, places)
    return replace(
        passage,
        **{name: getattr(passage, name)[kept] for name in ("places", "own", "kinds", "log_probs", "rows")},
    )


def _find_last(tokens: Sequence[int], mark: Sequence[int]) -> int:
    """Where the last `mark` begins in `tokens`; 0 without one.

    >>> _find_last([5, 1, 2, 5, 1, 2, 7], [1, 2])
    4
    """
    starts = range(len(tokens) - len(mark), 0, -1) if mark else ()
    return next((start for start in starts if list(tokens[start : start + len(mark)]) == list(mark)), 0)


@contextlib.contextmanager
def _scaled(model: Any, factor: float) -> Iterator[None]:
    """The model with so much of its adapter."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: factor * value for name, value in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
