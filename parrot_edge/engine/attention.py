"""Attention compiled for this machine, in place of llama.cpp's own; see attention.c.

llama.cpp takes no kernels from outside, but it shows an eval callback each node of its graphs before it
computes them, and ggml has custom operations: the callback makes the one the other. The source is compiled
once for a llama.cpp and its CPU, against the header that llama-cpp-python installs, so that both agree on
what a tensor is. Where anything is missing for that, llama.cpp's own attention serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C

from parrot_edge.errors import ModelError
from parrot_edge.store import cache_dir

_SOURCE = Path(__file__).with_name("attention.c")
_HEADER = Path(C.__file__).parents[1] / "include" / "ggml.h"
_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # what llama.cpp uses of the CPU, best first
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-shared", "-fPIC")
_PATIENCE = 120  # seconds; it takes two


@dataclass(frozen=True)
class Attention:
    """Who computes attention: `callback` is for llama.cpp's `cb_eval`, None where its own serves; `reason`
    says in a sentence why."""

    callback: Any
    reason: str


@functools.cache
def load_attention(features: tuple[str, ...]) -> Attention:
    """The kernels for what llama.cpp uses of the CPU (`native.cpu_features`), compiled at their first use."""
    level = next((level for feature, level in _LEVELS.items() if feature in features), None)
    try:
        if level is None:
            raise ModelError(f"there are kernels for {' and '.join(_LEVELS)} alone")
        if C.llama_supports_gpu_offload():
            raise ModelError("there is a GPU")
        library = _find_library(level)
        take = ctypes.CDLL(str(library)).take_attention
    except ModelError as error:
        return Attention(None, f"llama.cpp's own: {error}")
    except OSError as error:
        return Attention(None, f"llama.cpp's own: {library} cannot be loaded ({error})")
    callback = ctypes.cast(take, C.ggml_backend_sched_eval_callback)
    return Attention(callback, f"compiled for this machine ({level})")


def compile_attention(target: Path, level: str) -> None:
    """Compile the kernels for "x86-64-v3" or "x86-64-v4"; `target` appears whole or not at all.

    Raises `ModelError` where there is no compiler, or it fails, or `target` cannot be written.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not _HEADER.is_file():
        raise ModelError(f"llama-cpp-python came without {_HEADER.name}")
    if not shutil.which(compiler[0]):
        raise ModelError(f"there is no C compiler called {compiler[0]} to make a faster one")
    command = [*compiler, *_FLAGS, f"-march={level}", f"-I{_HEADER.parent}", str(_SOURCE)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder) / target.name
            done = subprocess.run(
                [*command, "-o", str(draft), "-lm"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PATIENCE,
                text=True,
                errors="replace",
            )
            if done.returncode != 0:
                why = next(
                    (line for line in done.stderr.splitlines() if "error" in line), "it gives no reason"
                )
                raise ModelError(f"{compiler[0]} does not compile {_SOURCE.name} ({why.strip()})")
            draft.replace(target)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{compiler[0]} has not compiled {_SOURCE.name} in {_PATIENCE} s") from None
    except OSError as error:
        raise ModelError(f"{target.parent} cannot be written ({error.strerror})") from None


def _find_library(level: str) -> Path:
    """The compiled kernels, from the cache or made now; another source, header or level is another file."""
    made_of = (_SOURCE.read_bytes(), _HEADER.read_bytes() if _HEADER.is_file() else b"", level, _FLAGS)
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    library = cache_dir() / "attention" / f"{digest}.so"
    if not library.is_file():
        compile_attention(library, level)
    return library
