"""Runs one of llama.cpp's converters, as a process of its own: python converter_process.py JOB.json

The job names the folder `toolkit`, the `script` in it with its `arguments`, the `metadata` that goes
into the file in place of what the script guesses, and `pre`, a pre-tokenizer's name or null. This file
is never imported, and imports nothing of parrot_edge: in this process `gguf` is llama.cpp's own.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

# What the converter knows of the model itself. The rest of general.* it guesses, from the names of
# folders and from model cards.
KEPT = ("architecture", "type", "file_type", "quantization_version", "size_label", "alignment")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path[0] = job["toolkit"]  # in place of the folder of this file
    sys.path.insert(1, f"{job['toolkit']}/gguf-py")
    gguf, conversion = map(importlib.import_module, ("gguf", "conversion"))
    write_header = gguf.GGUFWriter.write_header_to_file

    def amend_and_write(writer: Any, *arguments: Any, **options: Any) -> None:
        amend(writer.kv_data[0], job["metadata"], gguf)
        write_header(writer, *arguments, **options)

    gguf.GGUFWriter.write_header_to_file = amend_and_write
    if job["pre"]:
        conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: job["pre"]
    sys.argv = [job["script"], *job["arguments"]]
    runpy.run_path(job["script"], run_name="__main__")


def amend(values: dict[str, Any], metadata: dict[str, Any], gguf: Any) -> None:
    """Drop what was guessed, and set what is known: pairs of a type's name and a value."""
    for key in list(values):
        if key.startswith("general.") and key.removeprefix("general.") not in KEPT:
            del values[key]
    for key, (kind, value) in metadata.items():
        item = gguf.GGUFValueType[kind[0]] if isinstance(kind, list) else None
        outer = gguf.GGUFValueType.ARRAY if isinstance(kind, list) else gguf.GGUFValueType[kind]
        values[key] = gguf.GGUFValue(as_bytes(value), outer, item)


def as_bytes(value: Any) -> Any:
    """Text as its bytes: of a token these may be no UTF-8."""
    if isinstance(value, list):
        return [as_bytes(item) for item in value]
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
