"""llama.cpp's own converters, of the very version that the pinned llama-cpp-python is built from.

They lie in its source archive and not in its wheel. pip fetches the archive, so a mirror, a proxy or
credentials serve here as they do for any package; pip checks its hash, and the few files that are
wanted stay in the cache. `python -m parrot_edge.convert.toolkit` fetches them beforehand.

They run as a process of their own, with their own `gguf`, which the user's environment never sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from parrot_edge.convert.files import Metadata, read_gguf
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.machine import installed_version
from parrot_edge.store import cache_dir, lock, refuse_existing, sha256_of

VERSION = "0.3.36"
"""The llama-cpp-python that pyproject.toml pins."""

SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of its source archive."""

_ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
_INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
_WANTED = re.compile(r"LICENSE|convert_(hf|lora)_to_gguf\.py|(conversion|gguf-py/gguf)/[\w/]+\.py")
_PROCESS = Path(__file__).with_name("converter_process.py")


def convert_hf(
    folder: Path,
    target: Path,
    outtype: str = "f16",
    *,
    metadata: Metadata,
    pre: str | None = None,
    force: bool = False,
) -> None:
    """Write a model that transformers has saved as the GGUF `target`, its matrices of `outtype`.

    `metadata` replaces what the converter would guess of name, licence and origin from folders, and
    adds to the rest. `pre` names the rule by which text is split before it is tokenised, as llama.cpp
    spells it, where the converter would not recognise it. Tensors are read one at a time. Raises
    `OutputError` where `target` exists without `force` or cannot be written, and `ModelError` where
    the model cannot be converted or the converter cannot be had.
    """
    _run("convert_hf_to_gguf.py", [folder, "--outtype", outtype], target, metadata, pre, force)


def convert_lora(
    folder: Path,
    base_config: Path,
    target: Path,
    outtype: str = "f16",
    *,
    metadata: Metadata,
    force: bool = False,
) -> None:
    """Write a peft LoRA as the GGUF `target`; `base_config` holds its base's config.json.

    Raises as `convert_hf` does.
    """
    arguments = [folder, "--base", base_config, "--outtype", outtype]
    _run("convert_lora_to_gguf.py", arguments, target, metadata, None, force)


def find_toolkit() -> Path:
    """The folder with the converters; fetched into the cache the first time.

    Raises `ModelError` where they cannot be had, which says where to place the archive by hand.
    """
    folder = cache_dir() / "llama.cpp" / VERSION
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / ".lock"):
            if not folder.is_dir():
                _fetch(folder)
    except OSError as error:
        place = error.filename or folder.parent
        raise ModelError(
            f"llama.cpp's converters cannot be stored ({place}: {error.strerror or error})"
        ) from None
    return folder


def _fetch(folder: Path) -> None:
    placed = folder.parent / _ARCHIVE
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as aside:
        archive = placed if placed.is_file() else _download(Path(aside), placed)
        if sha256_of(archive) != SHA256:
            raise ModelError(f"{archive} is damaged or of another version: its SHA-256 differs; replace it")
        files = Path(aside) / "files"
        with tarfile.open(archive) as content:
            for member in content:
                name = member.name.removeprefix(_INSIDE)
                source = content.extractfile(member) if _WANTED.fullmatch(name) else None
                if source is not None:
                    (files / name).parent.mkdir(parents=True, exist_ok=True)
                    (files / name).write_bytes(source.read())
        os.replace(files, folder)


def _download(folder: Path, placed: Path) -> Path:
    """The archive, by pip; nothing is compiled."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in said if line.startswith("ERROR: ")), said[-1] if said else "no reason"
        )
        raise ModelError(
            f"llama.cpp's converters cannot be downloaded (pip: {reason.removeprefix('ERROR: ')[:200]}); run "
            f"again with a network, or place {_ARCHIVE} at {placed}"
        )
    return folder / _ARCHIVE


def _run(
    script: str,
    arguments: Sequence[object],
    target: Path,
    metadata: Metadata,
    pre: str | None,
    force: bool,
) -> None:
    refuse_existing(target, force=force)
    missing = [name for name in ("torch", "transformers", "safetensors") if not installed_version(name)]
    if missing:
        raise UsageError(f"converting needs {', '.join(missing)}; run pip install 'parrot-edge[train]'")
    toolkit = find_toolkit()
    with _draft(target) as draft, tempfile.TemporaryDirectory() as aside:
        job = {
            "toolkit": str(toolkit),
            "script": str(toolkit / script),
            "arguments": [*map(str, arguments), "--outfile", str(draft)],
            "metadata": metadata,
            "pre": pre,
        }
        order = Path(aside) / "job.json"
        order.write_text(json.dumps(job), encoding="utf-8")
        code, said = _call([sys.executable, str(_PROCESS), str(order)])
        if code:
            raise ModelError(f"{arguments[0]} cannot be converted: {_explain(code, said)}")
        read_gguf(draft)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A name beside `target` that no one else uses, and that is gone afterwards.

    The converter takes braces in a name for something to be filled in, so `target`'s own does not do.
    """
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; name another place") from None
    try:
        yield folder / "draft.gguf"
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(command: list[str]) -> tuple[int, str]:
    """Exit code of a process and what it wrote to stderr; it ends with this one, and sees no network."""
    odd = ("PYTHONSAFEPATH", "NO_LOCAL_GGUF")  # both would let another gguf take the place of its own
    environment = {key: value for key, value in os.environ.items() if key not in odd}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, said


def _explain(code: int, said: str) -> str:
    """The reason in what a converter wrote: the last line, which names the exception."""
    if code < 0:
        return f"the converter was ended by signal {-code}; see that memory and disk suffice"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else f"the converter failed with code {code}"
    if "BPE pre-tokenizer was not recognized" in said:
        return "llama.cpp does not know how its tokenizer splits text; take a base whose tokenizer it knows"
    last = re.sub(r"^(ERROR:[\w-]+:|[\w.]*(Error|Exception): )", "", last)
    return last[:300] or "it gave no reason"


if __name__ == "__main__":
    print(find_toolkit())
