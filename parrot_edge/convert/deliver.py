"""Where people take a model: a card and a Modelfile beside its files, and the hub.

It knows the files and what their certificate says, not how they were made.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_edge.convert.files import BASE_SHA256_KEY, read_gguf
from parrot_edge.convert.ollama import write_modelfile
from parrot_edge.convert.quantize import note_fallbacks
from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.native import Model, is_activated, read_text
from parrot_edge.engine.template import ChatTemplate
from parrot_edge.errors import ModelError
from parrot_edge.hub import check_upload, upload_files
from parrot_edge.machine import format_bytes
from parrot_edge.models import LocalModel
from parrot_edge.roles import NATIVE, SYSTEM_KEY, AskPrompt, ask_view
from parrot_edge.store import new_file, read_json, refuse_existing, sha256_of

UPLOADED = ("*.gguf", "README.md", "Modelfile", "certificate.json", "certificate.html", "certificate/*")
"""What of a folder goes to the hub."""

_PLAYS = {
    "ask": "plays the user: it writes the next message of a person who talks to an assistant",
    "chat": "plays the assistant: it answers in a dialogue of several turns",
    None: "talks",
}


@dataclass(frozen=True)
class Release:
    """What is handed out.

    name        of the model, for people
    models      its files, all in one folder, the one to recommend first
    role        "ask", "chat", or None where it is unknown
    license     SPDX identifier, or None
    base_model  repository on the hub that it was trained from, or None
    """

    name: str
    models: Sequence[LocalModel]
    role: str | None = None
    license: str | None = None
    base_model: str | None = None


def write_delivery(
    folder: Path, release: Release, *, certificate: Mapping[str, Any] | None = None, force: bool = False
) -> None:
    """Write README.md, the model card, and a Modelfile into the folder that holds the release's files.

    `certificate` is what certificate.json holds. Raises `OutputError` where one of them exists without
    `force` or cannot be written, and `ModelError` for a GGUF that cannot be read.
    """
    texts = {"README.md": _write_card(release, certificate or {})}
    model = release.models[0]
    if not (model.adapter and is_activated(model.adapter)):  # Ollama would apply it to what it must not
        texts["Modelfile"] = write_modelfile(model.path, model.adapter, role=release.role)
    for name in texts:
        refuse_existing(folder / name, force=force)
    for name, text in texts.items():
        with new_file(folder / name, force=force) as draft:
            draft.write_text(text, encoding="utf-8")


def check_base(model: LocalModel) -> None:
    """Raise `ModelError` where an adapter is put over a base that it was neither trained nor certified on.

    The first is told by the adapter itself, the second by a certificate.json beside it.
    """
    wanted = read_text(model.adapter, BASE_SHA256_KEY) if model.adapter else None
    if model.adapter is None or wanted is None:
        return
    found = sha256_of(model.path)
    certified = read_json(model.adapter.with_name("certificate.json")).get("files", [])
    if found != wanted and not any(
        file.get("sha256") == found and file.get("adapter") and not file.get("failed") for file in certified
    ):
        raise ModelError(
            f"{model.adapter} was trained over another file than {model.path}, and no certificate beside it "
            "says that it runs there; name its own base"
        )


def push(folder: Path, repo_id: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Upload a delivered folder to the hub, as a model of `repo_id`, and return its address.

    Raises as `upload_files` does, and `ModelError` where the folder holds no model or its certificate failed.
    """
    check_upload(repo_id)
    if not (folder / "README.md").is_file() or not any(folder.glob("*.gguf")):
        raise ModelError(f"{folder} holds no GGUF with a README.md to upload; name what was converted")
    if read_json(folder / "certificate.json").get("passed") is False:
        raise ModelError(
            f"{folder} failed its certificate, so it is not uploaded; see certificate.html in it"
        )
    return upload_files(
        folder,
        UPLOADED,
        repo_id,
        kind="model",
        message="Upload a certified model",
        private=private,
        endpoint=endpoint,
    )


# The model card


def _write_card(release: Release, certificate: Mapping[str, Any]) -> str:
    """README.md: what it is, how to run it, what was measured of it."""
    model = release.models[0]
    parts = [
        _front_matter(release),
        f"# {release.name}",
        f"It {_PLAYS[release.role]}. Made by `parrot convert`.",
    ]
    parts += ["## Files", _table_of_files(release, certificate)]
    if certificate:
        parts.append(_verdict(certificate))
    parts += ["## With parrot", _with_parrot(release), "## With llama.cpp", _with_llama_cpp(model)]
    if model.adapter and is_activated(model.adapter):
        parts.append(
            "It is an activated adapter (arXiv 2504.12397): Ollama and LM Studio do not know these, and "
            "would apply it to what it must not change."
        )
    else:
        short = _short_name(release.name)
        parts += ["## With Ollama", _shell(f"ollama create {short} -f Modelfile", f"ollama run {short}")]
        parts += ["## With LM Studio", _with_lm_studio(model)]
    if release.role == "ask":
        parts += ["## How to prompt it", _ask_prompt(model)]
    return "\n\n".join(parts) + "\n"


def _front_matter(release: Release) -> str:
    tags = ["gguf", "llama.cpp", "parrot-edge", "dialogue", *(["lora"] if release.models[0].adapter else [])]
    relation = "adapter" if release.models[0].adapter else "finetune"
    lines = ["---", *([f"license: {json.dumps(release.license)}"] if release.license else [])]
    if release.base_model:
        lines += [f"base_model: {json.dumps(release.base_model)}", f"base_model_relation: {relation}"]
    return "\n".join([*lines, "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---"])


def _table_of_files(release: Release, certificate: Mapping[str, Any]) -> str:
    """Size and, where they were certified, the figures of each file."""
    known = {file["name"]: file for file in certificate.get("files", [])}
    notes = list[str]()
    rows = ["| file | type | size | KL divergence, nats a token | same likeliest token |", "| --- " * 5 + "|"]
    for model in release.models:
        names = [model.path.name, *([model.adapter.name] if model.adapter else [])]
        found = known.get(model.name) or known.get("+".join(names)) or {}
        size = sum(path.stat().st_size for path in (model.path, model.adapter) if path)
        kl = _interval((found.get("kl") or {}).get("mean"))
        agreement = _interval(found.get("agreement"))
        cells = [
            " + ".join(f"`{name}`" for name in names),
            found.get("type") or "",
            format_bytes(size),
            kl,
            agreement,
        ]
        rows.append(f"| {' | '.join(cells)} |")
        if note := note_fallbacks(read_gguf(model.path), str(found.get("type"))):
            notes.append(f"In `{model.path.name}`, {note}.")
    return "\n\n".join(["\n".join(rows), *notes])


def _interval(figure: Mapping[str, float] | None) -> str:
    if not figure:
        return ""
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def _verdict(certificate: Mapping[str, Any]) -> str:
    if certificate.get("passed"):
        return (
            "Every file was held against the trained model and says the same within the thresholds of "
            "`certificate.html`, which shows how it was measured; intervals are of 95 %."
        )
    sentences = [sentence for file in certificate.get("files", []) for sentence in file.get("failed", [])]
    return "\n".join(["**It failed its certificate:**", "", *(f"- {sentence}" for sentence in sentences)])


def _with_parrot(release: Release) -> str:
    model, name = release.models[0], _short_name(release.name)
    files = "+".join(path.name for path in (model.path, model.adapter) if path)
    side = "ask" if release.role == "ask" else "chat"
    return _shell(
        f"parrot models add {name} {shlex.quote(f'./{files}')}",
        f"parrot simulate --{side} {name} -o dialogues.jsonl",
    )


def _with_llama_cpp(model: LocalModel) -> str:
    lora = f" --lora {shlex.quote(model.adapter.name)}" if model.adapter else ""
    return _shell(f"llama-server -m {shlex.quote(model.path.name)}{lora} --jinja")


def _with_lm_studio(model: LocalModel) -> str:
    if model.adapter:
        return "LM Studio runs no adapters; take a merged file."
    return _shell(f"lms import {shlex.quote(model.path.name)}")


def _ask_prompt(model: LocalModel) -> str:
    """How Ask's prompt ends, shown for a dialogue of one exchange."""
    system = read_text(model.adapter or model.path, SYSTEM_KEY)
    dialogue = [Message("user", "how do i descale a kettle?"), Message("assistant", "Boil it with vinegar.")]
    view = ask_view(Seed(""), dialogue, AskPrompt(native=True, system=system) if system else NATIVE)
    with Model(model.path, vocab_only=True) as header:
        if header.chat_template is None:
            return "The prompt ends where the user's next message begins."
        template = ChatTemplate(header.chat_template, bos=header.bos, eos=header.eos, name=model.path.name)
        prompt = template.render(view, "user")
    return (
        "Chat programs ask for the assistant's turn, and this model writes the user's. Outside parrot, give "
        "it the prompt word by word (llama-server's `/completion`, Ollama's `/api/generate`), up to where "
        "the user's next message begins; an empty message ends the dialogue:\n\n"
        f"```json\n{json.dumps(prompt, ensure_ascii=False)}\n```"
    )


def _shell(*commands: str) -> str:
    return "\n".join(["```", *commands, "```"])


def _short_name(name: str) -> str:
    """A name as `parrot models add` and Ollama take it.

    >>> _short_name("Ask for SmolLM2-135M + mine")
    'ask-for-smollm2-135m-mine'
    """
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._").removesuffix(".gguf") or "model"
