"""Files of the Hugging Face hub: pinned to a commit, checked by hash, at hand without a network."""

from __future__ import annotations

import errno
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from parrot_edge.errors import ModelError, UsageError
from parrot_edge.store import cache_dir, lock, read_json, record_of, sha256_of, write_json

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub.

    Downloads lie in huggingface_hub's own cache, shared with other programs; at `path` is a link to
    one, and beside it a JSON with its commit, size and SHA-256. The link stays, whatever becomes of
    the branch, until the file is pulled again. A file placed at `path` by hand is taken as it is.
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
    def find_all(cls) -> Iterator[HubFile]:
        """The GGUF files that are here."""
        folder = cache_dir() / "hub"
        for path in sorted(folder.glob("*/*@*/**/*.gguf")):
            owner, repo, *file = path.relative_to(folder).parts
            name, _, revision = repo.partition("@")
            if path.is_file():  # not a link whose file was deleted
                yield cls(f"{owner}/{name}", "/".join(file), urllib.parse.unquote(revision))

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}" + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def path(self) -> Path:
        """Where the file lies, or is to be placed."""
        revision = urllib.parse.quote(self.revision, safe="")
        return cache_dir() / "hub" / f"{self.repo}@{revision}" / self.file

    @property
    def commit(self) -> str | None:
        """The commit that the file is of, where that is known."""
        return read_json(record_of(self.path)).get("commit")

    def locate(self, *, download: bool, refresh: bool) -> Path:
        """The file's path; with `refresh`, of the newest commit.

        Raises `ModelError` where it has been cut short, or is not here and cannot be had.
        """
        for part in self._shards():
            if refresh or not os.path.isfile(part.path):
                if not download:
                    raise ModelError(f"{part} is not here yet; `parrot models pull {self}` downloads it")
                part._pull(refresh)
            size = part.path.stat().st_size
            if read_json(record_of(part.path)).get("bytes", size) != size:
                raise ModelError(
                    f"{part.path} has changed since it came; `parrot models pull {self}` mends it"
                )
        return self.path

    def _shards(self) -> list[HubFile]:
        """The files that must lie together: `name-00001-of-00003.gguf` and so on, mostly just this one."""
        match = re.fullmatch(r"(.*-)00001(-of-(\d{5})\.gguf)", self.file)
        if not match:
            return [self]
        numbers = range(1, int(match[3]) + 1)
        return [replace(self, file=f"{match[1]}{number:05d}{match[2]}") for number in numbers]

    def _pull(self, refresh: bool) -> None:
        """Let a link to a whole copy appear at `path`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with lock(self.path.parent / ".lock"):
                if refresh or not os.path.isfile(self.path):  # else another process brought it meanwhile
                    self._adopt(self._copies(refresh))
        except OSError as error:
            raise ModelError(f"{self} cannot be stored: {error.strerror or error}") from None

    def _adopt(self, copies: Iterator[Path]) -> None:
        """Link to the first copy whose hash is the hub's."""
        for copy in copies:
            blob = copy.readlink().name if copy.is_symlink() else ""  # of a large file, its SHA-256
            sha256 = sha256_of(copy)
            if re.fullmatch(r"[0-9a-f]{64}", blob) and blob != sha256:
                continue
            commit = copy.parents[self.file.count("/")].name
            record = {"source": str(self), "commit": commit, "sha256": sha256, "bytes": copy.stat().st_size}
            link = self.path.with_name(".link")
            link.unlink(missing_ok=True)
            link.symlink_to(copy)
            write_json(record_of(self.path), record)
            os.replace(link, self.path)
            return
        raise ModelError(f"{self} arrived damaged: its SHA-256 is not the hub's; try again later")

    def _copies(self, refresh: bool) -> Iterator[Path]:
        """Copies in huggingface_hub's cache: what is there without a network, a download, a fresh one."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import disable_progress_bars

        revision = self.revision
        if not refresh:
            revision = self.commit or revision
            found = try_to_load_from_cache(self.repo, self.file, revision=revision)
            if isinstance(found, str):
                yield Path(found)
        if not sys.stderr.isatty():
            disable_progress_bars()
        for anew in (False, True):
            try:  # the metadata come first as hf_hub_download would try for half a minute without a network
                url = hf_hub_url(self.repo, self.file, revision=revision)
                commit = get_hf_file_metadata(url).commit_hash or revision
                found = hf_hub_download(self.repo, self.file, revision=commit, force_download=anew)
            except Exception as error:  # the HTTP library below changes between versions
                raise self._explain(error) from None
            yield Path(found)

    def _explain(self, error: Exception) -> Exception:
        """What a failed download means for the user."""
        from huggingface_hub import constants
        from huggingface_hub import errors as hub

        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
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
