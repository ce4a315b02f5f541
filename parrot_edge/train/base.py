"""The base model: where its files are, what its tokenizer and shape are, and how it is loaded.

A base is the embedded GGUF (`smollm2`), another GGUF, a folder as transformers saves it, or a name on
the hub. A GGUF is dequantised, so the adapter learns against the very weights it will run on. Weights
are read as safetensors or GGUF only, never unpickled. Torch is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_edge.errors import ModelError
from parrot_edge.models import EMBEDDED, LocalModel, parse_model
from parrot_edge.recipe import BaseOptions
from parrot_edge.store import sha256_of

SEGMENTS = "parrot_segments"
"""Name under which `attend_segments` is known to transformers."""


@dataclass(frozen=True)
class Base:
    """A base model's files.

    name    how it is named in cards: without folders
    target  what transformers loads from: a folder or a hub name
    gguf    name of the GGUF within the folder, or None
    """

    name: str
    target: str
    gguf: str | None
    revision: str

    @classmethod
    def locate(cls, options: BaseOptions) -> Base:
        """Find the files of a base; raises `ModelError` where there are none."""
        folder = Path(options.name)
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ModelError(f"{folder} holds no config.json; name a folder as transformers saves it")
            return cls(folder.resolve().name, str(folder), None, options.revision)
        if options.name == EMBEDDED or options.name.endswith(".gguf") or ".gguf@" in options.name:
            model = parse_model(options.name)
            if not isinstance(model, LocalModel) or model.adapter:
                raise ModelError(f"{options.name} cannot be trained on; name a GGUF file without an adapter")
            return cls(model.name, str(model.path.parent), model.path.name, options.revision)
        return cls(options.name, options.name, None, options.revision)

    def where(self) -> dict[str, Any]:
        """The arguments that tell `from_pretrained` where to load from."""
        if self.gguf:
            return {"pretrained_model_name_or_path": self.target, "gguf_file": self.gguf}
        return {"pretrained_model_name_or_path": self.target, "revision": self.revision}

    def identity(self, config: Any) -> dict[str, str]:
        """What tells this base from others: its name, and a hash of its weights or the hub's commit."""
        if self.gguf:
            return {"name": self.name, "file": self.gguf, "sha256": sha256_of(Path(self.target) / self.gguf)}
        weights = sorted(Path(self.target).glob("*.safetensors"))
        if weights:
            digest = hashlib.sha256("".join(map(sha256_of, weights)).encode())
            return {"name": self.name, "sha256": digest.hexdigest()}
        return {"name": self.name, "revision": getattr(config, "_commit_hash", None) or self.revision}


def load_tokenizer(base: Base, options: BaseOptions) -> Any:
    """The base's tokenizer, with the recipe's chat template if it names one."""
    from transformers import AutoTokenizer

    with one_sentence(f"the tokenizer of {base.name}"):
        tokenizer = AutoTokenizer.from_pretrained(**base.where())
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {base.name} tells no offsets; choose a base with a fast one")
    if base.gguf:
        _mend_tokenizer(tokenizer, Path(base.target) / base.gguf)
    if options.chat_template:
        is_text = "{" in options.chat_template
        try:
            text = options.chat_template if is_text else Path(options.chat_template).read_text("utf-8")
        except OSError as error:
            raise ModelError(f"{options.chat_template} cannot be read: {error.strerror}") from None
        tokenizer.chat_template = text
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(base: Base, tokenizer: Any) -> Any:
    """The base's shape; raises `ModelError` where the tokenizer knows tokens that it has no row for."""
    from transformers import AutoConfig

    with one_sentence(f"the configuration of {base.name}"):
        config = AutoConfig.from_pretrained(**base.where())
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{base.name} has {config.vocab_size} token embeddings and its tokenizer {len(tokenizer)} "
            "tokens; the two do not belong together"
        )
    return config


def load_model(base: Base, options: BaseOptions, *, dtype: Any, device: Any, padded: bool = False) -> Any:
    """The base model on a device, 4-bit where the recipe says so.

    padded: batches are padded and masked (preference pairs), which `attend_segments` knows nothing of.
    """
    from transformers import AutoModelForCausalLM

    register_segments()
    attention = options.attention
    if attention == "segments":
        attention = "sdpa" if padded else SEGMENTS  # type: ignore[assignment]
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "use_safetensors": True,
    }
    with one_sentence(f"the base {base.name}"):
        if options.quantization == "none":
            return AutoModelForCausalLM.from_pretrained(**base.where(), **arguments, **_gguf(base)).to(device)
        arguments |= {"quantization_config": nf4_options(dtype), "device_map": {"": device}}
        if not base.gguf:
            return AutoModelForCausalLM.from_pretrained(**base.where(), **arguments)
        # transformers takes one quantisation at a time: out of the GGUF's first, into NF4 then
        with tempfile.TemporaryDirectory() as folder:
            expand_gguf(base, folder)
            return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def nf4_options(dtype: Any) -> Any:
    """4 bits as transformers is told of them: NF4, double quantised, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def expand_gguf(base: Base, folder: Path | str) -> None:
    """Write a GGUF's weights as transformers saves them, dequantised."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(**base.where(), **_gguf(base)).save_pretrained(folder)


def register_segments() -> None:
    """Make `attend_segments` known to transformers; a second call does nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(SEGMENTS, attend_segments)
    AttentionMaskInterface.register(SEGMENTS, lambda *_, **__: None)


def attend_segments(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    segments: list[int] | None = None,
    turns: list[tuple[int, int, int]] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Causal attention within each segment of a row, computed segment by segment.

    query, key, value: (1, heads, T, d); segments: lengths whose sum is T, None for one. A mask over
    the whole row gives the same (a test compares them) but computes T x T scores, most of them to
    throw away, and keeps torch from its flash kernels.

    With `turns`, query is (1, heads, S, d) and holds turns that stand apart, their lengths' sum S;
    key and value are (1, heads, T + S, d), the line that was read before and then the turns. A turn
    (opening, start, stop) sees `opening..start` of the line, and itself.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    line, outputs, place = key.shape[2] - query.shape[2], [], 0
    if turns is None:
        turns = [(0, 0, length) for length in segments or [query.shape[2]]]
    for opening, start, stop in turns:
        length, seen = stop - start, start - opening
        own = slice(line + place, line + place + length)
        mask = None
        if seen or (sliding_window is not None and sliding_window < length):
            ones = torch.ones(length, seen + length, dtype=torch.bool, device=query.device)
            mask = ones.tril(seen)[None, None]  # (1, 1, length, seen + length)
            if sliding_window is not None:
                mask = mask & ones.triu(seen + 1 - sliding_window)
        keys, values = key[:, :, own], value[:, :, own]
        if seen:
            keys = torch.cat([key[:, :, opening:start], keys], dim=2)
            values = torch.cat([value[:, :, opening:start], values], dim=2)
        part = query[:, :, place : place + length]
        outputs.append(
            sdpa_attention_forward(module, part, keys, values, mask, is_causal=mask is None, **kwargs)[0]
        )
        place += length
    return torch.cat(outputs, dim=1), None  # (1, T or S, heads, d)


def _gguf(base: Base) -> dict[str, Any]:
    """Without this a model out of a GGUF cannot be saved, nor trained."""
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)} if base.gguf else {}


_HARD_TEXT = "It's 3.14 or 1024:\n\n1. naïve café, 你好 🦜  two\t\n  if x == 10:\r\n\n\n    return 'DON'T'  "


def _mend_tokenizer(tokenizer: Any, path: Path) -> None:
    """Split text into tokens as llama.cpp does; raises `ModelError` where that cannot be had.

    A GGUF names the rule by which text is split before it is tokenised, and transformers forgets it
    for some: for SmolLM2 one real message in ten then has tokens that the model was never trained on
    and that llama.cpp never makes.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    from parrot_edge.engine import native

    with native.Model(path, vocab_only=True) as vocabulary:
        if vocabulary.metadata.get("tokenizer.ggml.pre") == "smollm":
            digits = Digits(individual_digits=True)
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
        expected = vocabulary.tokenize(_HARD_TEXT.encode())
    if tokenizer(_HARD_TEXT, add_special_tokens=False).input_ids != expected:
        raise ModelError(
            f"transformers and llama.cpp split text differently for {path.name}; train on the model's own "
            "folder or hub name and convert the adapter"
        )


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn what the libraries raise for missing or broken files into one `ModelError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{what} cannot be loaded: {reason}") from None
