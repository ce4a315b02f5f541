"""The compiled attention, against a plain one in float64, and what serves where it cannot be had."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np
import pytest

from parrot_edge.engine import attention, native
from parrot_edge.engine.attention import Attention, compile_attention, load_attention
from parrot_edge.engine.native import Context, ContextShape, Model
from parrot_edge.errors import ModelError

F32, F16 = 0, 1  # enum ggml_type
FEATURES = tuple(native.cpu_features())
LEVELS = [level for feature, level in attention._LEVELS.items() if feature in FEATURES]
OWN = load_attention.__wrapped__(FEATURES)


class InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def declare(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(C._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


POINTER, WHOLE, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ggml_init = declare("ggml_init", POINTER, InitParams)
ggml_free = declare("ggml_free", None, POINTER)
new_tensor = declare("ggml_new_tensor_4d", POINTER, POINTER, ctypes.c_int, *[WHOLE] * 4)
permute = declare("ggml_permute", POINTER, POINTER, POINTER, *[ctypes.c_int] * 4)
flash_attn = declare("ggml_flash_attn_ext", POINTER, *[POINTER] * 5, *[REAL] * 3)
get_data = declare("ggml_get_data", POINTER, POINTER)
new_graph = declare("ggml_new_graph", POINTER, POINTER)
expand = declare("ggml_build_forward_expand", None, POINTER, POINTER)
compute = declare("ggml_graph_compute_with_ctx", ctypes.c_int, POINTER, POINTER, ctypes.c_int)
op_desc = declare("ggml_op_desc", ctypes.c_char_p, POINTER)


@pytest.fixture(scope="module", params=LEVELS)
def take(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bool]:
    """The callback, compiled for each level of x86-64 that this CPU has."""
    library = tmp_path_factory.mktemp("attention") / "attention.so"
    compile_attention(library, request.param)
    function = ctypes.CDLL(str(library)).take_attention
    function.restype, function.argtypes = ctypes.c_bool, (POINTER, ctypes.c_bool, POINTER)
    return function


def run_ggml(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    take: Callable[..., bool] | None,
    *,
    threads: int = 2,
    bias: float = 0.0,
    cap: float = 0.0,
) -> tuple[str, np.ndarray]:
    """What ggml makes of attention, and the operation that made it: q (S, T, H, D), k and v (S, N, G, D),
    mask (S, T, N); out (S, T, H, D)."""
    ctx = ggml_init(InitParams(64 * 2**20, None, False))

    def tensor(values: np.ndarray) -> int:
        made = new_tensor(ctx, F32 if values.dtype == np.float32 else F16, *values.shape[::-1])
        ctypes.memmove(get_data(made), np.ascontiguousarray(values).ctypes.data, values.nbytes)
        return made

    inputs = [permute(ctx, tensor(each), 0, 2, 1, 3) for each in (q, k, v)]
    out = flash_attn(ctx, *inputs, tensor(mask[:, None]), q.shape[-1] ** -0.5, bias, cap)
    if take is not None:
        assert not take(out, True, None)
    graph = new_graph(ctx)
    expand(graph, out)
    assert compute(ctx, graph, threads) == 0
    numbers = (REAL * q.size).from_address(get_data(out))
    made, operation = np.array(numbers).reshape(q.shape), op_desc(out).decode()
    ggml_free(ctx)
    return operation, made


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Softmax of the scaled products, in float64 (arXiv 1706.03762); 0 for a row that sees nothing."""
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(each.astype(np.float64), group, axis=2) for each in (k, v))
    scores = np.einsum("sthd,snhd->shtn", q.astype(np.float64), k) * q.shape[-1] ** -0.5 + mask[:, None]
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(most), 0, most))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("shtn,snhd->sthd", np.divide(weights, total, where=total > 0, out=weights), v)


def draw(
    size: int, heads: int, shared: int, tokens: int, sequences: int, positions: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.normal(0, 3, (sequences, tokens, heads, size)).astype(np.float32)
    k, v = rng.normal(0, 1, (2, sequences, positions, shared, size)).astype(np.float16)
    mask = np.where(rng.random((sequences, tokens, positions)) < 0.4, -np.inf, 0).astype(np.float16)
    mask[:, :, positions // 2 : positions // 2 + 64] = -np.inf  # a block that nobody sees
    mask[0, 0] = -np.inf
    mask[0, 0, positions - 1] = 0  # a row that sees one position
    if tokens > 1:
        mask[-1, -1] = -np.inf  # and one that sees none, as padding does
    return q, k, v, mask


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("size", "heads", "shared", "tokens", "sequences", "positions"),
    [
        (64, 9, 3, 1, 5, 256),  # SmolLM2-135M, a token each
        (64, 9, 3, 7, 2, 128),
        (128, 8, 2, 1, 1, 512),
        (128, 4, 4, 3, 1, 64),
        (96, 6, 6, 2, 2, 128),
        (256, 4, 1, 5, 1, 256),
        (64, 7, 1, 70, 1, 192),  # a prompt
        (64, 1, 1, 1, 1, 64),
    ],
)
def test_it_is_attention(take, size, heads, shared, tokens, sequences, positions, threads):
    q, k, v, mask = draw(size, heads, shared, tokens, sequences, positions)
    operation, made = run_ggml(q, k, v, mask, take, threads=threads)
    assert operation == "CUSTOM"
    np.testing.assert_allclose(made, plain_attention(q, k, v, mask), rtol=0, atol=5e-6)


def test_it_is_nearer_to_the_truth_than_llama_cpp(take):
    q, k, v, mask = draw(64, 9, 3, 1, 4, 256)
    truth = plain_attention(q, k, v, mask)
    ours, theirs = (run_ggml(q, k, v, mask, each)[1] for each in (take, None))
    assert np.abs(ours - truth).max() < 0.05 * np.abs(theirs - truth).max()


def test_a_row_is_the_same_whoever_it_stands_beside(take):
    q, k, v, mask = draw(64, 9, 3, 6, 3, 128)
    together = run_ggml(q, k, v, mask, take)[1]
    for s in range(3):
        alone = run_ggml(*(each[s : s + 1] for each in (q, k, v, mask)), take, threads=1)[1]
        assert (together[s] == alone[0]).all()
        first = run_ggml(*(each[s : s + 1] for each in (q[:, :1], k, v, mask[:, :1])), take)[1]
        assert (together[s, 0] == first[0, 0]).all()


def test_large_scores_do_not_overflow(take):
    q, k, v, mask = draw(64, 3, 3, 1, 1, 128)
    made = run_ggml(1000 * q, k, v, mask, take)[1]
    np.testing.assert_allclose(made, plain_attention(1000 * q, k, v, mask), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "case", ["alibi", "capped scores", "values in float32", "odd heads", "few positions"]
)
def test_what_it_cannot_compute_it_leaves(take, case):
    q, k, v, mask = draw(40 if case == "odd heads" else 64, 4, 2, 1, 2, 128)
    if case == "few positions":
        k, v, mask = k[:, :96], v[:, :96], mask[:, :, :96]
    if case == "values in float32":
        k, v = k.astype(np.float32), v.astype(np.float32)
    options = {"alibi": {"bias": 8.0}, "capped scores": {"cap": 30.0}}.get(case, {})
    operation, made = run_ggml(q, k, v, mask, take, **options)
    assert operation == "FLASH_ATTN_EXT"
    assert np.isfinite(made).all()


def test_the_real_model_says_what_it_says_with_llama_cpp_s_own(embedded_model, monkeypatch):
    """But for what sums in half precision cost llama.cpp."""

    def read() -> np.ndarray:
        with Model(embedded_model) as model, Context(model, ContextShape(4, 512, 1)) as context:
            text = model.tokenize(b"A fox came down to the river at dusk, looked at the moon and ") * 12
            ends = [1, 20, 64, 160]
            for lane, end in enumerate(ends):
                context.decode([(lane, 0, text[:end], False)])
            rows = context.decode([(lane, end, [text[end]], True) for lane, end in enumerate(ends)])
            logits = np.stack([np.array(context.logits(row), np.float64) for row in rows])
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    assert OWN.callback is not None, OWN.reason
    ours = read()
    monkeypatch.setattr(native, "attention", lambda: Attention(None, "for this test"))
    theirs = read()
    assert 0 < (np.exp(theirs) * (theirs - ours)).sum(-1).max() < 0.01


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("no-such-compiler", "there is no C compiler called no-such-compiler"),
        ("false", "false does not compile attention.c"),
    ],
)
def test_without_a_compiler_llama_cpp_s_own_serves(compiler, why, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PARROT_HOME", str(tmp_path))
    found = load_attention.__wrapped__(FEATURES)
    assert found.callback is None
    assert found.reason.startswith("llama.cpp's own: ")
    assert why in found.reason


def test_without_vectors_or_with_a_gpu_llama_cpp_s_own_serves(monkeypatch):
    assert "kernels for AVX512 and AVX2 alone" in load_attention.__wrapped__(("SSE3",)).reason
    monkeypatch.setattr(C, "llama_supports_gpu_offload", lambda: True)
    assert "there is a GPU" in load_attention.__wrapped__(FEATURES).reason


def test_without_a_cache_llama_cpp_s_own_serves(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("PARROT_HOME", str(tmp_path))
    assert "cannot be written" in load_attention.__wrapped__(FEATURES).reason


def test_a_damaged_library_does_not_end_the_program(tmp_path, monkeypatch):
    library = tmp_path / "attention.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(attention, "_find_library", lambda level: library)
    assert f"{library} cannot be loaded" in load_attention.__wrapped__(FEATURES).reason


def test_a_compiler_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ModelError, match="does not compile"):
        compile_attention(tmp_path / "attention.so", "no-such-level")
    assert not list(Path(tmp_path).iterdir())
