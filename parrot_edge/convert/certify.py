"""The certificate: whether a file in llama.cpp says what was trained, and if not, what is likely wrong.

A file is held against a `reference` by llama.cpp alone, without torch:

    vocabulary, tokens, template   the same prompt becomes the same tokens
    ends                           the model ends its turns, and the file makes programs stop there
    KL divergence, top-1           what it says at the same places of real dialogues (arXiv 2407.09141)
    perplexity                     of the held-out turns
    metadata                       licence, base of an adapter, nothing of the machine it was made on

Each failure is a sentence that says what is wrong and what to do. It knows nothing of how files are made.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import parrot_edge
from parrot_edge.convert.diagnose import Evidence, find_cause, log_softmax
from parrot_edge.convert.files import BASE_SHA256_KEY, GgufFile, import_gguf, read_gguf
from parrot_edge.convert.quantize import note_fallbacks
from parrot_edge.convert.reference import DIALOGUE_END, TURN_END, Passage, Reference, Text
from parrot_edge.engine.base import INVOCATION_KEY, Request
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.native import llama_version
from parrot_edge.engine.rates import measure_rates
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.figures import Member, Resampling, readable
from parrot_edge.machine import choose_threads
from parrot_edge.models import LocalModel
from parrot_edge.roles import ROLE_KEY
from parrot_edge.store import sha256_of, write_json

KL_LIMITS = {
    **{"F32": 0.002, "F16": 0.002, "BF16": 0.005},
    **{"8": 0.01, "6": 0.03, "5": 0.1, "4": 0.1, "3": 0.3, "2": 1.0, "1": 1.0},
}
"""Nats a token that a file may differ from the trained model, by its type or else by its type's bits."""

_TIMED = 8  # sequences
_BINS = np.concatenate([[0], np.logspace(-6, 1, 29)])  # of KL divergences, nats


@dataclass(frozen=True)
class Thresholds:
    """What a file must keep to; measured figures are compared, not the ends of their intervals.

    kl           mean KL divergence from the trained model, nats a token, by type or bits: "Q4_K_M", "4"
    perplexity   of held-out turns, as a multiple of the trained model's
    end_of_turn  by how much the mean probability of ending a turn, where turns end, may differ
    """

    kl: Mapping[str, float] = field(default_factory=lambda: dict(KL_LIMITS))
    perplexity: float = 1.1
    end_of_turn: float = 0.05

    def kl_limit(self, type_name: str) -> float:
        """The limit for a file type.

        >>> Thresholds().kl_limit("Q8_0"), Thresholds({"4": 0.1, "Q4_K_M": 0.05}).kl_limit("Q4_K_M")
        (0.01, 0.05)
        """
        bits = re.search(r"\d+", type_name)
        known = [self.kl[key] for key in (type_name, bits[0] if bits else "") if key in self.kl]
        return known[0] if known else max(self.kl.values(), default=0.0)


def parse_thresholds(settings: Sequence[str]) -> Thresholds:
    """Thresholds from "kl.Q4_0=0.3", "kl=0.01" (for every type), "perplexity=1.05", "end_of_turn=0.1".

    Raises `UsageError` for anything else.
    """
    kl, others = dict(KL_LIMITS), dict[str, float]()
    for setting in settings:
        name, _, text = setting.partition("=")
        key, _, type_name = name.partition(".")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UsageError(f"{setting!r} is no threshold; write for example kl.Q8_0=0.01")
        if name == "kl":
            kl = dict.fromkeys(kl, value)
        elif key == "kl" and type_name:
            kl[type_name.upper()] = value
        elif name in ("perplexity", "end_of_turn"):
            others[name] = value
        else:
            near = difflib.get_close_matches(name, ["kl", "perplexity", "end_of_turn"], n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UsageError(
                f"{name!r} is no threshold, those are kl, kl.TYPE, perplexity, end_of_turn{hint}"
            )
    return Thresholds(kl, **others)


@dataclass(frozen=True)
class Certificate:
    """What was found; `report` is what certificate.json holds, plain values and `readable` figures."""

    report: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """What is wrong, a sentence each; empty where every file says what was trained."""
        return [sentence for file in self.report["files"] for sentence in file["failed"]]

    def write(self, folder: Path, *, force: bool = False) -> None:
        """certificate.json and certificate.html into a folder; raises `OutputError` where they exist
        without `force` or cannot be written."""
        from parrot_edge.convert.certificate_page import write_page

        for name in ("certificate.json", "certificate.html"):
            if (folder / name).exists() and not force:
                raise OutputError(f"{folder / name} exists; pass --force to replace it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_page(self.report, folder / "certificate.html")
            write_json(folder / "certificate.json", self.report)
        except OSError as error:
            raise OutputError(
                f"the certificate cannot be written: {error.strerror}; free some space"
            ) from None


def certify(
    reference: Reference,
    models: Sequence[LocalModel],
    thresholds: Thresholds | None = None,
    *,
    threads: int | None = None,
    speed: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Hold files against what the trained model said.

    models      a GGUF each, or a base with the adapter over it
    thresholds  the defaults where they are None
    threads     or None for what suits this machine
    speed       measure tokens a second too, for about a second each

    A file that cannot be read fails; it does not raise.
    """
    thresholds, threads = thresholds or Thresholds(), threads or choose_threads().count
    files = []
    for model in models:
        say(f"certifying {model.name}")
        files.append(_Examination(reference, model, thresholds, threads).report(speed=speed))
    return Certificate(
        {
            "passed": not any(file["failed"] for file in files),
            "trained": {"name": reference.name, "role": reference.role, **reference.facts},
            "reference": {
                "dialogues": len(reference.passages),
                "groups": len(reference.groups),
                "targets": sum(len(passage.places) for passage in reference.passages),
                "places": len(reference.log_probs),
                "hard_texts": sum(text.hard for text in reference.texts),
                "made_up": reference.made_up,
                "missing": reference.missing,
            },
            "thresholds": {**vars(thresholds), "kl": dict(thresholds.kl)},
            "versions": {"parrot_edge": parrot_edge.__version__, "llama_cpp_python": llama_version()},
            "files": files,
        }
    )


class _Examination:
    """One file, held against a reference."""

    def __init__(self, reference: Reference, model: LocalModel, thresholds: Thresholds, threads: int) -> None:
        self._reference, self._model, self._thresholds = reference, model, thresholds
        self._threads = threads
        self._failed: list[str] = []
        self._notes: list[str] = []
        self._name = model.name or model.path.name

    def report(self, *, speed: bool) -> dict[str, Any]:
        """All that is told of the file."""
        self._found: dict[str, Any] = {
            "name": self._name,
            "type": None,
            "bytes": None,
            "failed": self._failed,
            "notes": self._notes,
        }
        try:
            self._examine_header()
            longest = max(len(passage.tokens) for passage in self._reference.passages)
            room = max([longest, *(c.length + c.limit + 1 for c in self._reference.continuations)])
            with Likelihood(
                self._model.path, adapter=self._model.adapter, tokens=room, threads=self._threads
            ) as likelihood:
                self._examine_prompts(likelihood)
                self._examine_ends(likelihood)
                if longest > likelihood.tokens:
                    raise ModelError(
                        f"{self._name} says that it holds {likelihood.tokens} tokens and was trained on "
                        f"{longest}; mend its context_length"
                    )
                self._compare(likelihood)
                self._found["continuations"] = self._continue(likelihood)
            if speed:
                rates = measure_rates(self._model.path, sequences=_TIMED, threads=self._threads)
                self._found["speed"] = {**vars(rates), "sequences": _TIMED, "threads": self._threads}
        except ModelError as error:
            self._failed.append(str(error))
        return readable(self._found)

    # What the file says of itself

    def _examine_header(self) -> None:
        path, adapter = self._model.path, self._model.adapter
        file = read_gguf(path)
        self._type = _type_of(file)
        self._found |= {
            "type": self._type,
            "bytes": path.stat().st_size,
            "bits_per_weight": 8 * sum(tensor.data.nbytes for tensor in file.tensors.values()) / _count(file),
            "sha256": sha256_of(path),
            "adapter": None,
        }
        if note := note_fallbacks(file, self._type):
            self._notes.append(f"In {self._name}, {note}.")
        self._examine_vocabulary(file)
        metadata = [(path, file)]
        if adapter is not None:
            lora = read_gguf(adapter)
            metadata.append((adapter, lora))
            invocation = lora.get(INVOCATION_KEY, [])
            if invocation != self._reference.invocation:
                self._failed.append(
                    f"{adapter.name} starts at the tokens {invocation} and was trained to start at "
                    f"{self._reference.invocation} (none: it reads everything); convert it again."
                )
            trained_on = lora.get(BASE_SHA256_KEY)
            self._found["adapter"] = {
                "bytes": adapter.stat().st_size,
                "sha256": sha256_of(adapter),
                "trained_on_this_base": trained_on == self._found["sha256"] if trained_on else None,
            }
            if trained_on and trained_on != self._found["sha256"]:
                self._notes.append(
                    f"{adapter.name} was trained over another file than {path.name}, perhaps the one that "
                    "this was made of; the figures tell whether it can run here."
                )
        for where, each in metadata:
            self._examine_metadata(where, each)
        told = metadata[-1][1].get(ROLE_KEY)
        if told and self._reference.role and told != self._reference.role:
            self._failed.append(
                f"{self._name} says that it plays {told} and was trained as {self._reference.role}; "
                f"put {ROLE_KEY} right and convert again."
            )

    def _examine_metadata(self, path: Path, file: GgufFile) -> None:
        """Licence, and folders of the machine that the file was made on."""
        wanted, told = self._reference.facts.get("license"), file.get("general.license")
        is_last = path == (self._model.adapter or self._model.path)
        if is_last and wanted and not told:
            self._failed.append(
                f"{path.name} names no licence and the recipe says {wanted}; convert again with it."
            )
        elif is_last and not told:
            self._notes.append(
                f"{path.name} names no licence; set `license` in the recipe before you share it."
            )
        for key in file.metadata:
            text = file.get(key)
            if (
                isinstance(text, str)
                and not key.startswith("tokenizer.")
                and (found := _LOCAL_PATH.search(text))
            ):
                self._failed.append(
                    f"{path.name} tells a folder of the machine it was made on ({key}: {found[1]}...); "
                    "convert again, or remove the key, before you share it."
                )

    def _examine_vocabulary(self, file: GgufFile) -> None:
        """Whether every number stands for the same token."""
        trained, stored = self._reference.vocabulary, file.get("tokenizer.ggml.tokens", [])
        texts = [text.decode("utf-8", "replace") for text in stored]
        different = [
            number
            for number, text in enumerate(trained)
            if text is not None and (number >= len(texts) or texts[number] != text)
        ]
        self._found["vocabulary"] = {"tokens": len(texts), "different": len(different)}
        if different:
            first = different[0]
            has = repr(texts[first]) if first < len(texts) else "nothing"
            self._failed.append(
                f"{self._name} has {has} as token {first} where the trained tokenizer has "
                f"{trained[first]!r} ({len(different):,} of {len(trained):,} tokens differ); convert with "
                "the tokenizer of the base that was trained on."
            )

    # What becomes of a prompt

    def _examine_prompts(self, likelihood: Likelihood) -> None:
        template = {"checked": 0, "different": 0, "first": None}
        tokens = {"checked": 0, "different": 0, "first": None}
        for text in self._reference.texts:
            for expected, got in self._render(likelihood, text):
                _count_case(template, expected, got)
            ids = likelihood.engine.batcher.model.tokenize(text.text.encode("utf-8"))
            at = _first_difference(text.tokens, ids)
            _count_case(tokens, _ids_at(text.tokens, at), _ids_at(ids, at))
        self._found |= {"template": template, "tokens": tokens}
        for what, cases, advice in (
            ("writes the prompt otherwise", template, "put the chat template of the training into the file"),
            (
                "splits text into other tokens",
                tokens,
                "convert with the tokenizer of the base that was trained",
            ),
        ):
            if cases["different"]:
                first: Any = cases["first"]
                self._failed.append(
                    f"{self._name} {what} than in training, in {cases['different']} of {cases['checked']} "
                    f"cases: {first['file']!r} where {first['trained']!r} was trained; {advice}."
                )

    def _render(self, likelihood: Likelihood, text: Text) -> Iterator[tuple[str, str]]:
        """For each turn, all before it as in training, and as the file's own template has it."""
        leading = text.messages[0].role == "system"
        for number, start in enumerate(text.starts):
            history = text.messages[: number + leading]
            role = "assistant" if number % 2 else "user"
            try:
                got = likelihood.engine.render(Request(history, role)).decode("utf-8")
            except ModelError as error:
                got = str(error)
            yield text.text[:start], got

    def _examine_ends(self, likelihood: Likelihood) -> None:
        """Whether programs stop where the trained model ends its turns, and at the end of a text."""
        reference = self._reference
        closing = reference.closing["user" if reference.role == "ask" else "assistant"]
        model = likelihood.engine.batcher.model
        piece, eos = likelihood.text_of([closing]), model.eos_token
        stops = model.ends_generation(closing)
        self._found["ends"] = {"token": closing, "text": piece, "stops": stops, "eos": eos}
        if not stops and closing in reference.control:
            self._failed.append(
                f"{self._name} does not stop at {piece!r} (token {closing}), which closes a turn, so it "
                "would babble on; set tokenizer.ggml.eot_token_id to it and convert again."
            )
        elif reference.eos is not None and eos not in (reference.eos, *reference.closing.values()):
            self._failed.append(
                f"{self._name} has token {eos} ({model.eos!r}) as its end of text, and the trained tokenizer "
                f"has {reference.eos}; set tokenizer.ggml.eos_token_id to that and convert again."
            )

    # What it says

    def _compare(self, likelihood: Likelihood) -> None:
        reference, limit = self._reference, self._thresholds.kl_limit(self._type)
        evidence = Evidence(reference)
        passages = list(self._listen(likelihood, evidence))
        if not passages:
            return
        resampling = Resampling({"": reference.groups})
        listed = evidence.listed
        members = [("", group) for group in evidence.groups]
        mean = resampling.mean(members, listed)
        self._found["kl"] = {
            "mean": mean,
            "median": float(np.median(listed)),
            "p99": float(np.percentile(listed, 99)),
            "max": float(np.max(listed)),
            "limit": limit,
            "histogram": {"edges": _BINS.tolist(), "counts": _histogram(listed)},
        }
        self._found["agreement"] = resampling.share(members, evidence.agrees)
        self._found["perplexity"] = {
            "own": _perplexity(reference.passages, passages, resampling, own=True),
            "other": _perplexity(reference.passages, passages, resampling, own=False),
        }
        for key, kind in (("turn", TURN_END), ("dialogue", DIALOGUE_END)):
            self._found["ends"][key] = _ending(reference.passages, passages, resampling, kind)
        self._judge(evidence, float(mean[0]), limit)

    def _listen(self, likelihood: Likelihood, evidence: Evidence) -> Iterator[Passage]:
        """The passages with what the file says in place of the trained model."""
        gap = 1 if likelihood.engine.adapter else 16  # an activated adapter reads each turn by itself
        for passage in self._reference.passages:
            log_probs = np.full(len(passage.places), np.nan)
            for first, stop in _runs(passage.places, gap):
                end = int(passage.places[stop - 1]) + 1
                start = int(passage.places[first])
                index = first
                for place, logits in enumerate(likelihood.logits(passage.tokens[:end], start), start):
                    if index < stop and passage.places[index] == place:
                        said = log_softmax(logits)
                        log_probs[index] = said[passage.tokens[place]]
                        if passage.rows[index] >= 0:
                            evidence.add(int(passage.rows[index]), said, passage.group)
                        index += 1
            yield replace(passage, log_probs=log_probs)

    def _judge(self, evidence: Evidence, kl: float, limit: float) -> None:
        """Sentences for what is beyond its threshold, with the likely cause."""
        own = self._found["perplexity"]["own"]
        ratio = float(own["ratio"][0]) if own else 1.0
        turn = self._found["ends"]["turn"]
        if not kl <= limit:
            cause = find_cause(evidence, kl, self._type, self._found["adapter"])
            self._found["diagnosis"] = cause.as_dict()
            self._failed.append(
                f"{self._name} differs from the trained model by a KL divergence of {kl:.4g} nats a token, "
                f"and {limit:g} is allowed for {self._type}: {cause.sentence}"
            )
        if own and not ratio <= self._thresholds.perplexity:
            self._failed.append(
                f"{self._name} finds the held-out turns {ratio:.3g} times as perplexing as the trained model "
                f"does, and {self._thresholds.perplexity:g} is allowed; take a type with more bits."
            )
        if turn:
            trained, got = float(turn["trained"][0]), float(turn["file"][0])
            if not abs(got - trained) <= self._thresholds.end_of_turn:
                self._failed.append(
                    f"{self._name} ends a turn with probability {got:.3f} where turns end, and the trained "
                    f"model with {trained:.3f}; take more bits, or convert again if 16 bits fail too."
                )

    def _continue(self, likelihood: Likelihood) -> list[dict[str, Any]]:
        """What the trained model wrote, and what the file writes to the same prompts."""
        found = []
        for wanted in self._reference.continuations:
            text = likelihood.write_on(wanted.messages, wanted.next_role, wanted.limit)
            found.append(
                {
                    "messages": [message.as_dict() for message in wanted.messages],
                    "next_role": wanted.next_role,
                    "trained": wanted.text,
                    "file": text,
                    "common": _first_difference(wanted.text, text),
                }
            )
        return found


_LOCAL_PATH = re.compile(
    r"(?:^|[\s\"'=(,])((?:file:/)?/(?:home|root|tmp|Users|work|mnt|media|data|var|opt|srv|content|workspace)/"
    r"[^\s/]+|[A-Za-z]:\\[^\s\\]+|~/[^\s/]+)"
)


def _type_of(file: GgufFile) -> str:
    """The file type that a GGUF says it has, else the one of most of its weights."""
    types = import_gguf().LlamaFileType
    try:
        return str(types(file.get("general.file_type")).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        sizes: dict[str, int] = {}
        for tensor in file.tensors.values():
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.data.nbytes
        return max(sizes, key=lambda name: sizes[name], default="")


def _count(file: GgufFile) -> int:
    """Weights of a file, at least 1."""
    return max(1, sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values()))


def _count_case(cases: dict[str, Any], trained: Any, got: Any) -> None:
    """Count a comparison, and keep what is around the first difference."""
    cases["checked"] += 1
    if trained == got:
        return
    cases["different"] += 1
    if cases["first"] is None:
        at = max(0, _first_difference(trained, got) - 20) if isinstance(trained, str) else 0
        cases["first"] = {"trained": trained[at : at + 80], "file": got[at : at + 80]}


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """At which index two sequences part.

    >>> _first_difference("abc", "abd"), _first_difference("ab", "ab")
    (2, 2)
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ids_at(tokens: Sequence[int], at: int) -> list[int]:
    return list(tokens[max(0, at - 2) : at + 4])


def _runs(places: np.ndarray, gap: int) -> Iterator[tuple[int, int]]:
    """Stretches of targets no more than `gap` tokens apart: from and to, as indices of `places`.

    >>> list(_runs(np.array([3, 4, 9, 40, 41]), 16))
    [(0, 3), (3, 5)]
    """
    cuts = [0, *(np.flatnonzero(np.diff(places) > gap) + 1).tolist(), len(places)]
    yield from ((start, stop) for start, stop in itertools.pairwise(cuts) if stop > start)


def _histogram(values: Sequence[float]) -> list[int]:
    inside = np.clip(np.nan_to_num(values, nan=_BINS[-1]), 0, _BINS[-1])
    return np.histogram(inside, _BINS)[0].tolist()


def _members(passages: Sequence[Passage], masks: Sequence[np.ndarray]) -> list[Member]:
    return [
        ("", passage.group) for passage, mask in zip(passages, masks, strict=True) for _ in range(mask.sum())
    ]


def _perplexity(
    trained: Sequence[Passage], said: Sequence[Passage], resampling: Resampling, *, own: bool
) -> dict[str, np.ndarray] | None:
    """exp(-mean ln P) of the role's targets, or of the other one's; None where there are none."""
    masks = [passage.own == own for passage in trained]
    members = _members(trained, masks)
    if not members:
        return None

    def perplexity(passages: Sequence[Passage]) -> np.ndarray:
        values = np.concatenate([p.log_probs[mask] for p, mask in zip(passages, masks, strict=True)])
        return np.exp(-resampling.mean(members, values.tolist()))

    before, after = perplexity(trained), perplexity(said)
    return {"trained": before, "file": after, "ratio": after / before}


def _ending(
    trained: Sequence[Passage], said: Sequence[Passage], resampling: Resampling, kind: int
) -> dict[str, Any] | None:
    """Mean probability of the closing token where it stands; None where it stands nowhere."""
    masks = [passage.own & (passage.kinds == kind) for passage in trained]
    members = _members(trained, masks)
    if not members:
        return None

    def mean(passages: Sequence[Passage]) -> np.ndarray:
        values = np.concatenate([p.log_probs[mask] for p, mask in zip(passages, masks, strict=True)])
        return resampling.mean(members, np.exp(values).tolist())

    return {"places": len(members), "trained": mean(trained), "file": mean(said)}
