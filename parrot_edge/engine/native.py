"""llama.cpp's C interface, typed and safe: handles that free themselves, errors instead of NULL.

The one module that calls `llama_cpp`, but for `ggml`, which looks into what is computed. It knows nothing
of scheduling; see `llama` for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np

from parrot_edge.engine.attention import Attention, load_attention
from parrot_edge.engine.base import INVOCATION_KEY, Sampling
from parrot_edge.engine.ggml import Observer, Watch
from parrot_edge.errors import ModelError, UsageError

MAX_SEQUENCES = 256
"""llama.cpp's own limit on sequences in one context."""

_PENALTY_WINDOW = 64  # tokens
_PENALTY_CANDIDATES = 128  # penalties look each candidate up, and llama.cpp finds more than 128 slowly
_GGUF_FLOAT32, _GGUF_STRING = 6, 8  # enum gguf_type
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")  # types of tensors that llama.cpp cannot multiply by
_ADAPTER_KEYS = {
    **dict.fromkeys(("general.type", "general.architecture", "adapter.type"), _GGUF_STRING),
    "adapter.lora.alpha": _GGUF_FLOAT32,
}
_WARN, _ERROR = 3, 4  # ggml_log_level
_ONLY_CONVERTED = ("NVFP4",)  # file types that llama.cpp reads but does not quantise to

_LARGE_BLOCK = 4 * 2**20  # bytes

_log: deque[str] = deque(maxlen=20)


@C.llama_log_callback
def _on_log(level: int, text: bytes, _: object) -> None:
    if level in (_WARN, _ERROR):
        _log.append(text.decode("utf-8", "replace").strip())


_last_file: Path | None = None  # that llama.cpp was given


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _on_abort(text: bytes) -> None:
    """Where llama.cpp finds what it takes to be impossible it ends the process, and nothing can stop it.
    So the user hears one sentence, as of any other error, and no dump; what was recorded is on disk."""
    reason = re.sub(r"^\S+:\d+: ", "", " ".join(text.decode("utf-8", "replace").split()))
    sentence = f"parrot: llama.cpp gave up ({reason}); is {_last_file} damaged? Fetch or make it again"
    os.write(2, f"{sentence}\n".encode("utf-8", "backslashreplace"))
    os._exit(1)


# llama.cpp keeps the pointers, so the callbacks live as long as the module does.
C.llama_log_set(_on_log, ctypes.c_void_p(0))
C._lib.ggml_set_abort_callback(_on_abort)
C.llama_backend_init()


def llama_version() -> str:
    """The version of llama-cpp-python, to which the bundled llama.cpp belongs."""
    return importlib.metadata.version("llama-cpp-python")


def system_info() -> str:
    """What the CPU offers to llama.cpp's kernels, as llama.cpp prints it."""
    return C.llama_print_system_info().decode()


def cpu_features(info: str | None = None) -> list[str]:
    """What of the CPU this build of llama.cpp makes use of; `info` is `system_info()` if not given.

    >>> cpu_features("CPU : AVX2 = 1 | FMA = 1 | AVX512 = 0 | REPACK = 1 | ")
    ['AVX2', 'FMA', 'REPACK']
    """
    pairs = (part.split(":")[-1].split("=") for part in (info or system_info()).split("|") if "=" in part)
    return [name.strip() for name, value in pairs if value.strip() != "0"]


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16, and llama.cpp uses them."""
    return "AVX512_BF16" in cpu_features()


def attention() -> Attention:
    """Who computes attention in contexts that are not observed."""
    return load_attention(tuple(cpu_features()))


def supports_gpus() -> bool:
    """Whether this build of llama.cpp computes on GPUs where there are some."""
    return bool(C.llama_supports_gpu_offload())


class _GgufParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@contextlib.contextmanager
def _open_header(path: Path) -> Iterator[Any]:
    """The header of a GGUF, and the library with the functions that read it; raises `ModelError`."""
    _check_gguf(path)
    gguf = C._lib  # llama_cpp does not declare this part of the library
    gguf.gguf_init_from_file.restype = ctypes.c_void_p
    gguf.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufParams]
    gguf.gguf_free.argtypes = [ctypes.c_void_p]
    for name, result, *arguments in (
        ("find_key", ctypes.c_int64, ctypes.c_char_p),
        ("get_val_str", ctypes.c_char_p, ctypes.c_int64),
        ("get_kv_type", ctypes.c_int, ctypes.c_int64),
        ("get_n_tensors", ctypes.c_int64),
        ("get_tensor_size", ctypes.c_size_t, ctypes.c_int64),
        ("get_tensor_name", ctypes.c_char_p, ctypes.c_int64),
        ("get_tensor_type", ctypes.c_int, ctypes.c_int64),
    ):
        function = getattr(gguf, f"gguf_{name}")
        function.restype, function.argtypes = result, [ctypes.c_void_p, *arguments]
    header = gguf.gguf_init_from_file(os.fsencode(path), _GgufParams(no_alloc=True, context=None))
    if not header:
        raise ModelError(f"{path} cannot be read: {_why()}; check the file or fetch it again")
    try:
        yield gguf, header
    finally:
        gguf.gguf_free(header)


def _check_header(path: Path, types: Mapping[str, int] = MappingProxyType({})) -> None:
    """Refuse what llama.cpp would not survive: tensors of nothing, weights that it has no arithmetic for,
    and keys that are not of the type that it takes for granted. Raises `ModelError`."""
    global _last_file
    _last_file = path
    kinds = [kind.name for kind in tensor_kinds()]
    with _open_header(path) as (gguf, header):
        for key, kind in types.items():
            index = gguf.gguf_find_key(header, key.encode())
            if index >= 0 and gguf.gguf_get_kv_type(header, index) != kind:
                raise ModelError(f"{path} is damaged: {key} is of another type; fetch or make it again")
        for index in range(gguf.gguf_get_n_tensors(header)):
            kind = kinds[gguf.gguf_get_tensor_type(header, index)]
            name = gguf.gguf_get_tensor_name(header, index).decode("utf-8", "replace")
            is_weight = name.endswith((".weight", ".lora_a", ".lora_b"))
            if not gguf.gguf_get_tensor_size(header, index) or (is_weight and kind in _NO_WEIGHTS):
                raise ModelError(f"{path} is damaged: {name} is empty or {kind}; fetch or make it again")


def is_activated(path: Path) -> bool:
    """Whether a GGUF is an activated adapter, told from its header; raises `ModelError`."""
    with _open_header(path) as (gguf, header):
        return bool(gguf.gguf_find_key(header, INVOCATION_KEY.encode()) >= 0)


def read_text(path: Path, key: str) -> str | None:
    """A text among the metadata of a GGUF, adapters included, or None; raises `ModelError`."""
    with _open_header(path) as (gguf, header):
        index = gguf.gguf_find_key(header, key.encode())
        if index < 0 or gguf.gguf_get_kv_type(header, index) != _GGUF_STRING:
            return None
        return gguf.gguf_get_val_str(header, index).decode("utf-8", "replace")


def tensor_types(path: Path) -> dict[str, str]:
    """The type of each tensor of a GGUF, "F32" or "Q4_K", told from its header; raises `ModelError`."""
    names = {number: kind.name for number, kind in enumerate(tensor_kinds())}
    with _open_header(path) as (gguf, header):
        return {
            gguf.gguf_get_tensor_name(header, index).decode(): names[gguf.gguf_get_tensor_type(header, index)]
            for index in range(gguf.gguf_get_n_tensors(header))
        }


@dataclass(frozen=True)
class TensorKind:
    """A type of tensors: `block` numbers of a row are kept together, in `bytes` bytes. Types that were
    removed from llama.cpp have none of either."""

    name: str
    block: int
    bytes: int


@functools.cache
def tensor_kinds() -> tuple[TensorKind, ...]:
    """The types of tensors that this llama.cpp knows, by their number."""
    ggml = C._lib
    ggml.ggml_type_name.restype, ggml.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    ggml.ggml_blck_size.restype, ggml.ggml_blck_size.argtypes = ctypes.c_int64, [ctypes.c_int]
    ggml.ggml_type_size.restype, ggml.ggml_type_size.argtypes = ctypes.c_size_t, [ctypes.c_int]
    count = C.llama_model_quantize_default_params().output_tensor_type  # "none", the number behind the last
    kinds = []
    for number in range(count):
        name = (ggml.ggml_type_name(number) or b"").decode().upper()
        kinds.append(TensorKind(name, ggml.ggml_blck_size(number), ggml.ggml_type_size(number)))
    return tuple(kinds)


def read_metadata(path: Path) -> dict[str, str]:
    """All scalar metadata of a GGUF, without loading its weights; raises `ModelError`."""
    with Model(path, vocab_only=True) as model:
        return model.metadata


def file_types() -> dict[str, int]:
    """The file types that this llama.cpp can write, by the names that llama-quantize has for them."""
    prefix = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_")
    names = {prefix.sub("", name): name for name in dir(C) if prefix.match(name)}
    return {name: getattr(C, names[name]) for name in sorted(names) if name not in _ONLY_CONVERTED}


def quantize(
    source: Path,
    target: Path,
    type_name: str,
    threads: int,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    notes: Mapping[str, int | str] | None = None,
) -> None:
    """Write `source` anew with its matrices as `type_name` ("Q4_0", "Q8_0", "F16", ...).

    Weights that are quantised already are expanded first. Nothing can stop it before its end; see
    `quantizer` for a call that can be stopped. Raises `UsageError` for an unknown type and `ModelError`
    where llama.cpp fails; a half-written target is removed.

    importance  of each tensor's columns, by its name: float32 (matrices * columns,)
    notes       metadata to add
    """
    ftype = file_types().get(type_name.upper())
    if ftype is None:
        raise UsageError(f"{type_name} is no file type of llama.cpp; Q8_0, Q4_K_M and F16 are some")
    params = C.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ftype, True, threads
    entries = [  # what the structures point to must live as long as the call
        (name.encode(), np.ascontiguousarray(values, np.float32).ravel())
        for name, values in (importance or {}).items()
    ]
    if entries:
        params.imatrix = (C.llama_model_imatrix_data * (len(entries) + 1))(
            *(
                C.llama_model_imatrix_data(
                    name, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size
                )
                for name, values in entries
            )
        )
    if notes:
        params.kv_overrides = (C.llama_model_kv_override * (len(notes) + 1))(*map(_override, notes.items()))
    _log.clear()
    if C.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        target.unlink(missing_ok=True)
        raise ModelError(f"{source} cannot be written as {type_name}: {_why()}")


def _override(note: tuple[str, int | str]) -> C.llama_model_kv_override:
    """A line of metadata as llama.cpp takes it; it holds at most 127 bytes of text."""
    key, value = note
    entry = C.llama_model_kv_override(key=key.encode())
    if isinstance(value, int):
        entry.tag, entry.value.val_i64 = C.LLAMA_KV_OVERRIDE_TYPE_INT, value
    else:
        text = value.encode()[:127].decode("utf-8", "ignore").encode()
        entry.tag, entry.value.val_str = C.LLAMA_KV_OVERRIDE_TYPE_STR, text
    return entry


def _why() -> str:
    """llama.cpp's own last words, shortened to the cause."""
    errors = [line.split(": ", 1)[-1] for line in _log if "error" in line.lower() or "failed" in line.lower()]
    return (errors or list(_log) or ["no reason given"])[0]


class _Handle:
    """A C pointer that is freed once: on `close`, at the end of a `with`, or with its last reference."""

    def __init__(self, pointer: object, free: Callable[[Any], object]) -> None:
        self.pointer = pointer
        self._finalizer = weakref.finalize(self, free, pointer)

    def close(self) -> None:
        self._finalizer()

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Model(_Handle):
    """A loaded GGUF: weights, vocabulary and metadata. Several contexts can share one.

    Raises `ModelError` where the file is missing, no GGUF, cut short, or of an architecture that
    this llama.cpp does not know.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        self.path = path
        _check_header(path)
        params = C.llama_model_default_params()
        params.vocab_only = vocab_only
        _log.clear()
        pointer = C.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            raise ModelError(f"{path} cannot be loaded: {_why()}; check the file or fetch it again")
        super().__init__(pointer, C.llama_model_free)
        self._vocab = C.llama_model_get_vocab(pointer)
        self.vocab_size: int = C.llama_vocab_n_tokens(self._vocab)
        if not (self._names_its_ends() and self._spells_every_byte()):
            self.close()
            raise ModelError(f"{path} has no tokenizer that can be used; convert the model anew")
        self.metadata = _read_metadata(pointer)

    def _names_its_ends(self) -> bool:
        """Whether there is a tokenizer, and the tokens that its prompts begin and end with."""
        vocab = self._vocab
        if C.llama_vocab_type(vocab) == C.LLAMA_VOCAB_TYPE_NONE:
            return False
        ends = (
            (C.llama_vocab_get_add_bos, C.llama_vocab_bos),
            (C.llama_vocab_get_add_eos, C.llama_vocab_eos),
        )
        return all(token(vocab) >= 0 for is_added, token in ends if is_added(vocab))

    def _spells_every_byte(self) -> bool:
        """Whether a tokenizer that falls back to bytes has a token for each: llama.cpp dies over one that is
        missing as soon as a text holds it."""
        if C.llama_vocab_type(self._vocab) != C.LLAMA_VOCAB_TYPE_SPM:
            return True
        bytes_of = {text: byte for byte in range(256) for text in (b"<0x%02X>" % byte, bytes([byte]))}
        missing = set(range(256))
        for token in range(self.vocab_size):
            missing.discard(bytes_of.get(C.llama_vocab_get_text(self._vocab, token), -1))
            if not missing:
                break
        return not missing

    @property
    def trained_context(self) -> int:
        """Longest context in tokens that the model was trained for; 0 where the file does not say."""
        return self._architecture_number("context_length")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the 16-bit key-value cache that one token of one sequence takes."""
        get = self._architecture_number
        layers, heads = get("block_count"), get("attention.head_count", 1)
        kv_heads = get("attention.head_count_kv", heads)
        head_size = get("embedding_length") // max(heads, 1)
        keys = get("attention.key_length", head_size)
        values = get("attention.value_length", head_size)
        return 2 * layers * kv_heads * (keys + values)

    def _architecture_number(self, key: str, default: int = 0) -> int:
        text = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", "")
        try:
            return int(text)
        except ValueError:  # absent, or an array with a value per layer
            numbers = [int(part) for part in text.strip("[]").split(",") if part.strip().isdigit()]
            return max(numbers, default=default)

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that the file carries."""
        return self.metadata.get("tokenizer.chat_template")

    @property
    def adds_bos(self) -> bool:
        """Whether prompts of this model start with its BOS token."""
        return bool(C.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> str:
        """The text of the token that starts a prompt, or "" where there is none."""
        return self._special_text(C.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """The text of the token that ends a text, or "" where there is none."""
        return self._special_text(self.eos_token)

    @property
    def eos_token(self) -> int:
        """The token that ends a text, or -1 where there is none."""
        return int(C.llama_vocab_eos(self._vocab))

    def _special_text(self, token: int) -> str:
        return "" if token < 0 else self.piece(token).decode("utf-8", "replace")

    def tokenize(self, text: bytes, *, add_special: bool = False) -> list[int]:
        """Token ids of UTF-8 text; texts of special tokens become those tokens."""
        capacity = len(text) + 8
        tokens = (C.llama_token * capacity)()
        count = C.llama_tokenize(self._vocab, text, len(text), tokens, capacity, add_special, True)
        if count < 0:
            raise ModelError(f"{self.path} cannot tokenize a text of {len(text)} bytes")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; part of a UTF-8 character where it is less than one."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = C.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def ends_turn(self, token: int) -> bool:
        """Whether a token ends a message: an end-of-generation token, or any other control token."""
        return bool(C.llama_vocab_is_eog(self._vocab, token) or C.llama_vocab_is_control(self._vocab, token))

    def ends_generation(self, token: int) -> bool:
        """Whether a token is one of those at which every program over llama.cpp stops."""
        return bool(C.llama_vocab_is_eog(self._vocab, token))

    def load_adapter(self, path: Path) -> Adapter:
        """A LoRA in GGUF form, checked against this base; raises `ModelError` where it does not fit."""
        _check_header(path, _ADAPTER_KEYS)
        _log.clear()
        pointer = C.llama_adapter_lora_init(self.pointer, os.fsencode(path))
        if not pointer:
            raise ModelError(
                f"{path} is no adapter for {self.path.name}: {_why()}; take the base it was trained on"
            )
        return Adapter(self, path, pointer)


class Adapter:
    """A LoRA adapter of a `Model`; llama.cpp frees it with the model.

    invocation  tokens that an activated adapter (arXiv 2504.12397) begins with, else empty
    """

    def __init__(self, model: Model, path: Path, pointer: object) -> None:
        self.model, self.path, self.pointer = model, path, pointer
        self.metadata = _metadata_items(
            lambda i, buffer, size: C.llama_adapter_meta_key_by_index(pointer, i, buffer, size),
            lambda i, buffer, size: C.llama_adapter_meta_val_str_by_index(pointer, i, buffer, size),
            C.llama_adapter_meta_count(pointer),
        )
        count = C.llama_adapter_get_alora_n_invocation_tokens(pointer)
        tokens = C.llama_adapter_get_alora_invocation_tokens(pointer)
        self.invocation: list[int] = [tokens[index] for index in range(count)]


@functools.cache
def _return_large_blocks() -> None:
    """Have glibc hand large blocks back when they are freed; another C library does as it likes.

    llama.cpp allocates its scheduler, some 80 MB, anew whenever another adapter is applied. In glibc's heap
    these blocks would leave holes, now here, now there, and a process of hours tens of MB larger.
    """
    mmap_threshold = -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, _LARGE_BLOCK)


@dataclass(frozen=True)
class ContextShape:
    """How large a context is.

    sequences   conversations it holds at once, 1 .. 256
    tokens      longest conversation of each, in tokens
    threads     CPU threads of a decode
    batch       most tokens of one decode
    outputs     most positions of one decode whose logits are wanted; 0 is one for each sequence
    """

    sequences: int
    tokens: int
    threads: int
    batch: int = 512
    outputs: int = 0

    def cache_bytes(self, model: Model) -> int:
        """Memory in bytes of the keys and values of all sequences."""
        return self.sequences * self.tokens * model.kv_bytes_per_token

    def sequence_bytes(self, model: Model) -> int:
        """Memory in bytes that a whole sequence takes outside its context (an estimate, rounded up)."""
        return self.tokens * (model.kv_bytes_per_token + 64) + 2**20

    def bytes(self, model: Model) -> int:
        """Memory in bytes that such a context takes beside the weights (an estimate, rounded up)."""
        logits = 2 * 4 * model.vocab_size * max(self.sequences, self.outputs)
        return self.cache_bytes(model) + logits + 48 * 2**20


class Context(_Handle):
    """A key-value cache over a model; each sequence has a stream of its own. With `adapter`, all that it
    reads and writes is under that one.

    An `observer`, for contexts of one sequence, is told what the model's matrices are multiplied by.
    Raises `ModelError` where llama.cpp cannot allocate it.
    """

    def __init__(
        self,
        model: Model,
        shape: ContextShape,
        adapter: Adapter | None = None,
        *,
        observer: Observer | None = None,
    ) -> None:
        _return_large_blocks()
        self.model, self.shape, self.adapter = model, shape, adapter
        params = C.llama_context_default_params()
        params.n_ctx = shape.sequences * shape.tokens
        params.n_seq_max = shape.sequences
        params.n_batch = params.n_ubatch = max(shape.batch, shape.sequences)
        params.n_outputs_max = max(shape.sequences, shape.outputs)
        params.n_threads = params.n_threads_batch = shape.threads
        params.kv_unified = False
        params.no_perf = True
        self._watch = Watch(observer) if observer is not None else None
        callback = self._watch.callback if self._watch else attention().callback
        if callback is not None:
            params.cb_eval = callback
        _log.clear()
        pointer = C.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise ModelError(
                f"no context of {shape.sequences} x {shape.tokens} tokens on {model.path}: {_why()}"
            )
        super().__init__(pointer, C.llama_free)
        self._applied: Adapter | None = None
        self.apply(adapter)
        self._memory = C.llama_get_memory(pointer)
        self._batch = _Batch(int(params.n_batch))

    def apply(self, adapter: Adapter | None) -> None:
        """Read and write with an adapter, or with none, from now on; what is cached stays as it is."""
        if adapter is self._applied:
            return
        count = 0 if adapter is None else 1
        adapters = (C.llama_adapter_lora_p_ctypes * 1)(adapter.pointer if adapter else None)
        if C.llama_set_adapters_lora(self.pointer, adapters, count, (ctypes.c_float * 1)(1.0)) != 0:
            raise ModelError(f"{self.model.path} cannot take the adapter: {_why()}")
        self._applied = adapter

    def decode(self, rows: Sequence[tuple[int, int, Sequence[int], int]]) -> list[int]:
        """Feed tokens; a row is (sequence, position of its first token, tokens, wanted): of its last
        `wanted` tokens the logits are wanted, of the last alone for True.

        Returns an index for each of them, in order, to give to `logits` or `Sampler.sample`; they hold
        until the next decode. The rows hold at most `shape.batch` tokens in all.
        """
        outputs = self._batch.fill(rows)
        if self._watch is not None:
            self._watch.expect(self._batch.wanted)
        _log.clear()
        code = C.llama_decode(self.pointer, self._batch.struct)
        if self._watch is not None:
            self._watch.check()
        if code != 0:
            raise ModelError(f"{self.model.path} failed to decode (code {code}): {_why()}")
        return outputs

    def logits(self, index: int) -> np.ndarray:
        """A copy of the logits behind an index that `decode` returned: float32 (vocab_size,)."""
        pointer = C.llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(pointer, (self.model.vocab_size,)).copy()

    def save(self, sequence: int, pool: BufferPool) -> SavedSequence:
        """A copy of a sequence's cache, in memory from `pool`."""
        size = C.llama_state_seq_get_size(self.pointer, sequence)
        buffer = pool.take(size)
        C.llama_state_seq_get_data(self.pointer, _bytes_of(buffer), size, sequence)
        return SavedSequence(buffer, size)

    def restore(self, sequence: int, saved: SavedSequence, pool: BufferPool) -> None:
        """Put a saved cache into an empty sequence and give its memory back to `pool`."""
        if C.llama_state_seq_set_data(self.pointer, _bytes_of(saved.buffer), saved.size, sequence) == 0:
            raise ModelError(f"{self.model.path} could not restore a conversation: {_why()}")
        pool.give(saved.buffer)

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Drop a sequence's cache from position `start` on; False where the model cannot drop a part."""
        return bool(C.llama_memory_seq_rm(self._memory, sequence, start, -1))


@dataclass(frozen=True)
class SavedSequence:
    """A sequence's cache outside its context: `size` bytes at the start of `buffer`."""

    buffer: np.ndarray
    size: int


class BufferPool:
    """Memory for saved sequences, used again: fresh pages cost more than the copy into them.

    A buffer has room for a whole sequence, `size` bytes, and is never freed; of that, only what was once
    written to takes memory. So a run comes to the most it needs, and stays there: buffers as large as each
    sequence happens to be leave holes behind that no other fits into.
    """

    def __init__(self, size: int) -> None:
        self._size, self._free = size, list[np.ndarray]()

    def take(self, size: int) -> np.ndarray:
        """A uint8 array of at least `size` bytes."""
        if size > self._size:
            return np.empty(size, np.uint8)
        return self._free.pop() if self._free else np.empty(self._size, np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Take a buffer back."""
        if buffer.size == self._size:
            self._free.append(buffer)


def _bytes_of(buffer: np.ndarray) -> object:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class _Batch:
    """llama.cpp's batch over numpy arrays, filled by slices: per-token ctypes writes would cost more."""

    def __init__(self, capacity: int) -> None:
        self.struct = C.llama_batch()
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        self._sequence = np.zeros(capacity, np.int32)
        self._count = np.ones(capacity, np.int32)
        rows = self._sequence.ctypes.data + 4 * np.arange(capacity)
        self._rows = rows.astype(np.uint64)
        as_pointer = ctypes.POINTER
        self.struct.token = self._token.ctypes.data_as(as_pointer(C.llama_token))
        self.struct.pos = self._pos.ctypes.data_as(as_pointer(C.llama_pos))
        self.struct.n_seq_id = self._count.ctypes.data_as(as_pointer(ctypes.c_int32))
        self.struct.seq_id = self._rows.ctypes.data_as(as_pointer(as_pointer(C.llama_seq_id)))
        self.struct.logits = self._logits.ctypes.data_as(as_pointer(ctypes.c_int8))

    @property
    def wanted(self) -> np.ndarray:
        """Whether the logits of each token are wanted: int8 (T,), 0 or 1."""
        return self._logits[: self.struct.n_tokens]

    def fill(self, rows: Sequence[tuple[int, int, Sequence[int], int]]) -> list[int]:
        start, outputs = 0, list[int]()
        for sequence, position, tokens, wanted in rows:
            end = start + len(tokens)
            self._token[start:end] = tokens
            self._pos[start:end] = np.arange(position, position + len(tokens))
            self._sequence[start:end] = sequence
            self._logits[start:end] = 0
            if wanted:
                self._logits[end - wanted : end] = 1
                outputs.extend(range(end - wanted, end))
            start = end
        self.struct.n_tokens = start
        return outputs


class Sampler(_Handle):
    """A sampler chain in C: grammar, top-k, repetition penalty, top-p, min-p, temperature, draw.

    Raises `UsageError` for a grammar that does not parse.
    """

    def __init__(self, model: Model, sampling: Sampling, seed: int) -> None:
        chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        super().__init__(chain, C.llama_sampler_free)
        vocab = C.llama_model_get_vocab(model.pointer)

        def add(sampler: object) -> None:
            C.llama_sampler_chain_add(chain, sampler)

        if sampling.grammar is not None:
            _log.clear()
            grammar = C.llama_sampler_init_grammar(vocab, sampling.grammar.encode(), b"root")
            if not grammar:
                raise UsageError(f"the grammar cannot be parsed: {_why()}; it is GBNF with a rule named root")
            add(grammar)
        if sampling.repeat_penalty != 1.0:
            add(C.llama_sampler_init_top_k(max(sampling.top_k, _PENALTY_CANDIDATES)))
            add(
                C.llama_sampler_init_penalties(
                    model.vocab_size, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
                )
            )
        if sampling.temperature == 0.0:
            add(C.llama_sampler_init_greedy())
            return
        if sampling.top_k > 0:
            add(C.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            add(C.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            add(C.llama_sampler_init_min_p(sampling.min_p, 1))
        add(C.llama_sampler_init_temp(sampling.temperature))
        add(C.llama_sampler_init_dist(seed))

    def sample(self, context: Context, index: int) -> int:
        """Draw a token from the logits at `index` and remember it for the penalty and the grammar."""
        return int(C.llama_sampler_sample(self.pointer, context.pointer, index))


def _check_gguf(path: Path) -> None:
    """One clear sentence for what is no GGUF at all, before llama.cpp sees it."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except IsADirectoryError:
        raise ModelError(f"{path} is a directory; name the GGUF file in it") from None
    except OSError as error:
        raise ModelError(
            f"{path} cannot be opened: {error.strerror}; `parrot models` lists what there is"
        ) from None
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file; convert the model first or name another file")


def _read_metadata(pointer: object) -> dict[str, str]:
    return _metadata_items(
        lambda i, buffer, size: C.llama_model_meta_key_by_index(pointer, i, buffer, size),
        lambda i, buffer, size: C.llama_model_meta_val_str_by_index(pointer, i, buffer, size),
        C.llama_model_meta_count(pointer),
    )


def _metadata_items(key_at, value_at, count: int) -> dict[str, str]:  # type: ignore[no-untyped-def]
    def text(read, index: int) -> str:  # type: ignore[no-untyped-def]
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = read(index, buffer, size)
            if needed < size:
                return buffer.value.decode("utf-8", "replace") if needed >= 0 else ""
            size = needed + 1

    return {text(key_at, index): text(value_at, index) for index in range(count)}
