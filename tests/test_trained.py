"""A trained adapter is loaded over the very base it was trained on, or one sentence says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("trl")

from test_convert_adapter import change
from tiny_bases import make_base
from tiny_gguf import add_lora, cut, torch_logits

from parrot_edge.convert.trained import WEIGHTS, find_trained, load_trained
from parrot_edge.errors import ModelError
from parrot_edge.recipe import BaseOptions, TrainRecipe, dump_recipe, load_recipe
from parrot_edge.train.base import Base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base tiny, an adapter for it in lora/, and what it says."""
    folder = tmp_path_factory.mktemp("made")
    model = make_base(folder / "tiny", "llama")
    np.save(folder / "logits.npy", torch_logits(add_lora(model, folder / "lora")))
    return folder


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "lora", tmp_path / "lora"))


def describe(lora: Path, base: dict[str, str], **rest: Any) -> None:
    """What a training run leaves beside the adapter."""
    (lora / "training.json").write_text(json.dumps({"role": "ask", "base": base, **rest}))
    recipe = TrainRecipe(role="ask", name="tiny", base=BaseOptions(name=base["name"]))
    (lora / "recipe.yaml").write_text(dump_recipe(recipe))


def identify(made: Path) -> dict[str, str]:
    return Base.locate(BaseOptions(name=str(made / "tiny"))).identity(None)


def test_plain_peft_folder_says_what_it_said(made: Path, lora: Path) -> None:
    trained = load_trained(lora, str(made / "tiny"))
    assert np.abs(torch_logits(trained.model) - np.load(made / "logits.npy")).max() < 1e-4
    assert (trained.role, trained.record, trained.verified, trained.invocation) == (None, {}, False, [])


def test_run_folder_tells_role_dtype_and_base(
    made: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(lora, identify(made), dtype="bfloat16")
    monkeypatch.chdir(made)  # where the base lies under its own name
    trained = find_trained(lora)
    assert (trained.role, trained.verified, str(trained.dtype)) == ("ask", True, "torch.bfloat16")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_are_those_trained_over_and_computing_is_in_float32(
    made: Path, lora: Path, quantization: str
) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    describe(lora, identify(made), dtype="bfloat16")
    recipe = load_recipe(lora / "recipe.yaml", [f"base.quantization={quantization}"])
    (lora / "recipe.yaml").write_text(dump_recipe(recipe))
    model = find_trained(lora, str(made / "tiny")).load_base()
    weights = load_file(made / "tiny" / "model.safetensors")
    embedding = model.model.embed_tokens.weight
    assert embedding.dtype == torch.float32
    assert embedding.equal(weights["model.embed_tokens.weight"].bfloat16().float())
    assert np.isfinite(torch_logits(model)).all()
    layer = model.model.layers[0].mlp.down_proj
    if quantization == "nf4":
        assert layer.compute_dtype == torch.float32
        given = torch.eye(layer.in_features)
        held = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.allclose(layer(given), held.float().T, rtol=2**-8, atol=0)  # `held` is in bfloat16
    else:
        assert layer.weight.equal(weights["model.layers.0.mlp.down_proj.weight"].bfloat16().float())


def test_base_that_is_not_here_is_named(made: Path, lora: Path, tmp_path: Path) -> None:
    describe(lora, identify(made))
    with pytest.raises(ModelError, match="was trained on the folder tiny; say where it lies with --base"):
        find_trained(lora)
    describe(lora, {"name": "base.gguf", "file": "base.gguf", "sha256": "0"})
    with pytest.raises(ModelError, match=r"was trained on the file base.gguf; say where it lies"):
        find_trained(lora)


def test_another_base_is_refused(made: Path, lora: Path) -> None:
    describe(lora, {"name": "tiny", "sha256": "0" * 64})
    with pytest.raises(ModelError, match=r"was trained on tiny \(sha256 000000000000\) and tiny is another"):
        find_trained(lora, str(made / "tiny"))


def test_adapter_of_another_shape_is_refused(made: Path, lora: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "other", "gpt2")
    with pytest.raises(ModelError) as caught:
        load_trained(lora, str(tmp_path / "other"))
    assert "\n" not in str(caught.value)


def test_missing_half_of_an_adapter_is_refused(made: Path, lora: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(lora / WEIGHTS)
    weights.pop(min(weights))
    save_file(weights, lora / WEIGHTS)
    with pytest.raises(ModelError, match="or is missing from the adapter"):
        load_trained(lora, str(made / "tiny"))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "training.json"])
def test_damaged_file_is_one_sentence(name: str, made: Path, lora: Path) -> None:
    describe(lora, identify(made))
    cut(lora / name)
    with pytest.raises(ModelError) as caught:
        load_trained(lora, str(made / "tiny"))
    assert "\n" not in str(caught.value)


def test_folder_without_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read: .*; name a folder that"):
        find_trained(tmp_path)


def test_4_bit_layers_are_never_set_to_evaluate(made: Path, lora: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    from parrot_edge.train import loops

    describe(lora, identify(made))
    text = (lora / "recipe.yaml").read_text().replace("quantization: none", "quantization: nf4")
    (lora / "recipe.yaml").write_text(text)
    trained = load_trained(lora, str(made / "tiny"))
    layers = [module for module in trained.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert all(layer.training for layer in layers)
    with loops.evaluating(trained.model):
        assert all(layer.training for layer in layers)
    assert all(layer.training for layer in layers)
    assert not trained.model.training


def test_changed_config_is_refused(made: Path, lora: Path) -> None:
    change(lora / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not tell its base; name it with --base"):
        find_trained(lora)
