"""The importance matrix: torch's numbers, llama-imatrix's file, and the rows that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
from tiny_gguf import TOKENS, read_fields, write_llama, write_random
from tiny_models import make_llama

from parrot_edge.convert import imatrix
from parrot_edge.convert.files import read_gguf
from parrot_edge.convert.imatrix import (
    Importance,
    ImportanceMatrix,
    check_imatrix,
    compute_imatrix,
    draw_dialogues,
    read_imatrix,
    write_imatrix,
)
from parrot_edge.dialogue import Message
from parrot_edge.engine.ggml import Observer, Product
from parrot_edge.engine.native import Context, ContextShape, Model
from parrot_edge.errors import InputError, ModelError, OutputError, UsageError
from parrot_edge.jsonl import encode

CHAT = "{% for m in messages %}w1é{{ m.content }}w0é{% endfor %}{% if add_generation_prompt %}w1é{% endif %}"


def observe(path: Path, wanted: int, observer: Observer) -> None:
    """Read TOKENS, with the logits of the last `wanted` asked for."""
    shape = ContextShape(sequences=1, tokens=256, threads=1, batch=64, outputs=len(TOKENS))
    with Model(path) as model, Context(model, shape, observer=observer) as context:
        context.decode([(0, 0, TOKENS, wanted)])


def torch_inputs(model: Any) -> dict[str, np.ndarray]:
    """What each Linear of a llama is given at TOKENS, by llama.cpp's name of it: float32 (T, columns)."""
    import torch

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    inputs: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = f"{names.get_name(name)}.weight"
            module.register_forward_pre_hook(
                lambda _, given, key=key: inputs.update({key: given[0][0].detach().numpy()})
            )
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    return inputs


def test_observed_inputs_are_what_torch_multiplies(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = make_llama()
    path, seen = write_llama(model, tmp_path / "tiny.gguf"), dict[str, Product]()
    observe(path, 20, lambda product: seen.update({product.name: product}))
    wanted = {name: rows for name, rows in torch_inputs(model).items() if name.startswith("blk.")}
    assert set(seen) == set(wanted)
    for name, product in seen.items():
        rows = wanted[name][-len(product.inputs) :]  # the last block goes on with the wanted tokens alone
        assert np.abs(product.inputs - rows).max() < 5e-3 * np.abs(rows).max(), name
        assert product.wanted.sum() == 20
        assert product.wanted[-20:].all()


def test_rows_go_to_the_experts_that_were_chosen(tmp_path: Path) -> None:
    seen = dict[str, Product]()
    observe(
        write_random(tmp_path / "moe.gguf", experts=4),
        20,
        lambda product: seen.update({product.name: product}),
    )
    router, gate, down = (seen[f"blk.0.ffn_{name}.weight"] for name in ("gate_inp", "gate_exps", "down_exps"))
    assert (router.matrices, gate.matrices, down.matrices) == (1, 4, 4)
    assert np.array_equal(gate.inputs[::2], router.inputs)  # each row goes to two experts
    assert np.array_equal(gate.inputs[1::2], router.inputs)
    assert (gate.matrix[::2] != gate.matrix[1::2]).all()
    assert np.array_equal(gate.matrix, down.matrix)
    assert len(down.inputs) == 2 * len(router.inputs) == 40
    assert len(np.unique(down.inputs, axis=0)) == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_an_observer_raises_ends_the_decode(error: type[BaseException], tmp_path: Path) -> None:
    calls = []

    def fail(product: Product) -> None:
        calls.append(product.name)
        raise error

    with pytest.raises(error):
        observe(write_random(tmp_path / "moe.gguf", experts=4), 1, fail)
    assert len(calls) == 1


def dialogue(*texts: str) -> list[Message]:
    return [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a chat template, of tokens that are words."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chatty")
    path = write_llama(make_llama(), folder / "tiny.gguf")
    reader = read_fields(path)
    writer = gguf.GGUFWriter(folder / "chat.gguf", "llama")
    source = gguf.GGUFReader(path)
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "tokenizer.chat_template"):
            kind = field.types[0]
            item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = [4] * 96 if key == "tokenizer.ggml.token_type" else reader[key]  # found in any text
            writer.add_key_value(key, value, kind, item)
    writer.add_chat_template(CHAT)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "chat.gguf"


def test_both_roles_read_the_same_and_weigh_it_apart(chatty: Path) -> None:
    said = [dialogue("w5éw6é", "w7éw8éw9é", "w10é", "w11é")]
    chat, ask = (compute_imatrix(chatty, said, role) for role in ("chat", "ask"))
    assert len(chat.tensors) == 2 * 7
    last = "blk.1.ffn_down.weight"  # only rows whose logits are wanted come so far
    assert chat.tensors[last].counts == 4 + 2  # the words of both answers, and what closes each
    assert ask.tensors[last].counts == 3 + 2
    first = "blk.0.attn_q.weight"
    assert chat.tensors[first].counts > 2 * chat.tensors[last].counts
    assert not np.allclose(chat.tensors[first].means, ask.tensors[first].means)


def test_half_of_the_weight_is_on_the_roles_rows() -> None:
    gatherer = imatrix._Gatherer()
    rows = np.float32([[1, 0], [0, 2], [0, 4], [3, 0]])
    wanted, experts = np.array([False, True, True, False]), np.array([0, 0, 0, 1])
    gatherer(Product("dense", 1, rows, np.zeros(4, np.int64), wanted))
    gatherer(Product("experts", 3, rows, experts, wanted))
    tensors = gatherer.tensors()
    assert tensors["dense"].counts.tolist() == [4]
    assert tensors["dense"].means[0].tolist() == [(10 / 4 + 0) / 2, (20 / 4 + 20 / 2) / 2]
    assert tensors["experts"].counts.tolist() == [3, 1, 0]
    assert tensors["experts"].means[1:].tolist() == [[9, 0], [1, 1]]


def test_reading_stops_when_enough_tokens_were_read(chatty: Path) -> None:
    said, heard = [dialogue("w5é", "w6é")] * 50, list[int]()
    matrix = compute_imatrix(chatty, said, "chat", tokens=30, on_progress=heard.append)
    assert 30 <= heard[-1] < 40
    assert matrix.tensors["blk.1.ffn_down.weight"].counts == 2 * len(heard)


def test_dialogues_without_a_turn_of_the_role_are_refused(chatty: Path) -> None:
    with pytest.raises(InputError, match="no dialogue holds a turn of the assistant"):
        compute_imatrix(chatty, [dialogue("w5é")], "chat")
    with pytest.raises(UsageError, match="'judge' is no role"):
        compute_imatrix(chatty, [dialogue("w5é")], "judge")


MATRIX = ImportanceMatrix(
    {
        "blk.0.attn_q.weight": Importance(np.float32([[4, 8]]), np.float32([4])),
        "blk.0.ffn_up_exps.weight": Importance(np.float32([[2, 6], [0, 0]]), np.float32([2, 0])),
    },
    ("oasst.jsonl",),
)


def test_file_is_that_of_llama_imatrix(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(MATRIX, path)
    fields = read_fields(path)
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["oasst.jsonl"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (1, 512)
    tensors = {tensor.name: (tensor.shape.tolist(), tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    shape, sums = tensors["blk.0.ffn_up_exps.weight.in_sum2"]
    assert (shape, sums.tolist()) == ([2, 2], [[2, 6], [0, 0]])
    shape, counts = tensors["blk.0.ffn_up_exps.weight.counts"]
    assert (shape, counts.tolist()) == ([1, 2], [[2], [0]])


def test_written_matrix_is_read_again_and_an_unused_expert_counts_as_one(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(MATRIX, path)
    matrix = read_imatrix(path)
    assert matrix.datasets == ("oasst.jsonl",)
    assert matrix.tensors["blk.0.attn_q.weight"].means.tolist() == [[1, 2]]
    assert matrix.tensors["blk.0.ffn_up_exps.weight"].means.tolist() == [[1, 3], [1, 1]]
    with pytest.raises(OutputError, match="exists; choose another name"):
        write_imatrix(MATRIX, path)


def test_matrix_of_another_model_and_other_files_are_refused(chatty: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has blk.0.attn_q.weight, which does not fit"):
        check_imatrix(MATRIX, read_gguf(chatty), chatty)
    with pytest.raises(ModelError, match="is no importance matrix"):
        read_imatrix(chatty)
    (tmp_path / "old.dat").write_bytes(b"\x01\0\0\0old")
    with pytest.raises(ModelError, match="is no GGUF file"):
        read_imatrix(tmp_path / "old.dat")


def test_dialogues_are_drawn_alike_and_without_those_to_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [m.as_dict() for m in dialogue(f"Question {n}", "Answer")]} for n in range(40)]
    path.write_bytes(b"".join(map(encode, rows)))
    some, everything = (draw_dialogues([str(path)], held_out=share) for share in (0.5, 0.0))
    assert 5 < len(some) < 35
    assert len(everything) == 40
    assert set(some) < set(everything)
    assert draw_dialogues([str(path)], held_out=0.5) == some
    assert [messages[0].content for messages in everything] != sorted(m[0].content for m in everything)
