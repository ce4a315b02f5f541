"""Files of the Hugging Face hub: pinned to a commit, checked by hash, at hand without a network.

And the other way: what a user hands out, uploaded.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from parrot_edge.errors import ModelError, UsageError, shorten
from parrot_edge.store import cache_dir, lock, sha256_of


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub.

    Downloads lie in huggingface_hub's own cache, shared with other programs; `path` is a link to one
    commit's. It stays, whatever becomes of the branch, until the file is pulled again. A file placed
    at `path` by hand is taken as it is.
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
        if (
            not match
            or not text.isprintable()
            or {"", ".", ".."} & {*match[1].split("/"), *match[2].split("/")}
        ):
            raise UsageError(
                f"{shorten(text)} is no file of the hub; write hf:owner/repo/file.gguf, or that and @revision"
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
        """The commit that the file is of; None for one that was placed by hand."""
        target = os.readlink(self.path) if self.path.is_symlink() else ""
        match = re.search(r"/snapshots/([0-9a-f]{40})/", target)
        return match and match[1]

    def locate(self, *, download: bool, refresh: bool) -> Path:
        """The file's path; with `refresh`, of the newest commit.

        Raises `ModelError` where it is not here and cannot be had.
        """
        for part in self._shards():
            if refresh or not os.path.isfile(part.path):
                if not download:
                    raise ModelError(f"{part} is not here yet; `parrot models pull {self}` downloads it")
                part._pull(refresh)
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
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with lock(folder / ".lock"):
                if not refresh and os.path.isfile(self.path):
                    return  # another process brought it meanwhile
                for copy in self._copies(refresh):
                    if _is_whole(copy):
                        break
                else:
                    raise ModelError(f"{self} arrived damaged: its SHA-256 is not the hub's; try again later")
                link = folder / ".link"
                link.unlink(missing_ok=True)
                link.symlink_to(copy.absolute())
                os.replace(link, self.path)
        except OSError as error:
            place = error.filename or folder
            raise ModelError(f"{self} cannot be stored ({place}: {error.strerror or error})") from None

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

        if isinstance(error, OSError) and error.errno:
            return error  # of the disk; those of the HTTP library have no number
        if not isinstance(error, hub.LocalEntryNotFoundError):
            for kind, reason in (
                (hub.GatedRepoError, "is gated; accept its terms on the hub and set HF_TOKEN"),
                (hub.RepositoryNotFoundError, "is not on the hub, or is private and HF_TOKEN is not set"),
                (hub.RevisionNotFoundError, f"has no revision {self.revision!r}; name another"),
                (hub.EntryNotFoundError, f"has no file {self.file} at {self.revision!r}; check its name"),
            ):
                if isinstance(error, kind):
                    return ModelError(f"{self.repo} {reason}")
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        return ModelError(
            f"{self} cannot be downloaded ({why}); run again with a network, or place the file at {self.path}"
        )


def _is_whole(copy: Path) -> bool:
    """Whether a file in huggingface_hub's cache has the hash that the hub told."""
    blob = copy.readlink().name if copy.is_symlink() else ""  # of a large file, its SHA-256
    return not re.fullmatch(r"[0-9a-f]{64}", blob) or blob == sha256_of(copy)


def check_upload(repo_id: str) -> str:
    """The token to upload with, which comes from HF_TOKEN alone.

    Raises `UsageError` where that is not set, or `repo_id` cannot be a repository.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UsageError(f"{repo_id!r} is no repository of the hub; write owner/name")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UsageError("HF_TOKEN is not set; put a token that may write into it")
    return token


def upload_files(
    folder: Path,
    patterns: Sequence[str],
    repo_id: str,
    *,
    kind: Literal["model", "dataset"],
    message: str,
    private: bool = True,
    endpoint: str | None = None,
) -> str:
    """Upload the files of a folder that match the patterns, in one commit, and return the address.

    The repository is made where there is none, for its owner alone if `private`. Raises as
    `check_upload` does, and `ModelError` where the hub refuses or is not there.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    token = check_upload(repo_id)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=folder,
            allow_patterns=list(patterns),
            commit_message=message,
        )
    except Exception as error:  # the HTTP library below changes between versions
        raise _explain_upload(repo_id, error, offline=constants.HF_HUB_OFFLINE) from None
    return str(url)


def _explain_upload(repo_id: str, error: Exception, *, offline: bool) -> ModelError:
    """What a failed upload means for the user."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if offline:
        return ModelError(f"{repo_id} cannot be uploaded while HF_HUB_OFFLINE is set; unset it")
    if status in (401, 403):
        return ModelError(f"the hub does not let this HF_TOKEN write to {repo_id}; take one that may")
    what = f"status {status}" if status else type(error).__name__
    return ModelError(f"{repo_id} cannot be uploaded ({what}); what was uploaded stays, run it again")
