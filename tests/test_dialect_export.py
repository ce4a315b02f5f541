"""Calibration, and a network as an ONNX file that says what torch says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from parrot_edge.dialect.calibration import Calibration, fit_calibration
from parrot_edge.dialect.export import export_onnx
from parrot_edge.dialect.network import build_network
from parrot_edge.dialect.runtime import Card, Runtime
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.recipe import DialectNetwork

TINY = DialectNetwork(channels=16, blocks=(1, 1), growth=8, bottleneck=16, embedding=12)
CARD = Card("tiny", ("a", "b", "ü"), Calibration(9.0, (0.5, -0.5, 0.0), 0.1), {"held_out": 0.2, "seed": 0})


def test_calibration_finds_the_scale_that_made_the_data() -> None:
    random = np.random.default_rng(0)
    cosines = random.uniform(-1, 1, size=(20000, 3))
    logits = 4.0 * cosines
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (random.random((20000, 1)) > shares.cumsum(axis=1)).sum(axis=1)
    found = fit_calibration(cosines, truth)
    assert found.scale == pytest.approx(4.0, rel=0.05)
    assert found.offsets == pytest.approx((0, 0, 0), abs=0.1)
    assert found.probabilities(cosines).mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_calibration_without_an_error_claims_no_certainty() -> None:
    cosines = np.array([[0.9, 0.0], [0.8, 0.1], [0.1, 0.9], [0.0, 0.8]])
    found = fit_calibration(cosines, np.array([0, 0, 1, 1]))
    assert 0.6 < found.probabilities(cosines)[0, 0] < 0.95


def test_labels_of_few_recordings_weigh_as_much() -> None:
    random = np.random.default_rng(1)
    truth = np.array([0] * 900 + [1] * 30)
    cosines = 0.3 * random.standard_normal((930, 2)) + 0.4 * (truth[:, None] == np.arange(2))
    found = fit_calibration(cosines, truth)
    assert abs(found.offsets[0] - found.offsets[1]) < 0.6  # ln(30) = 3.4 is what the counts would give


def test_unknown_threshold_balances_or_keeps_the_known() -> None:
    known = np.stack([np.linspace(0.5, 1.0, 101), np.zeros(101)], axis=1)
    known[::2] = known[::2, ::-1]
    truth = known.argmax(axis=1)
    assert fit_calibration(known, truth).unknown_below == pytest.approx(0.525)
    strange = np.stack([np.linspace(0.0, 0.6, 101), np.zeros(101)], axis=1)
    both = fit_calibration(np.concatenate([known, strange]), np.concatenate([truth, np.full(101, -1)]))
    assert 0.5 < both.unknown_below < 0.6
    assert both.is_unknown(strange).mean() == pytest.approx(1 - both.is_unknown(known).mean(), abs=0.03)


def test_calibration_of_one_label_is_refused() -> None:
    with pytest.raises(UsageError, match="two labels"):
        fit_calibration(np.zeros((3, 2)), np.zeros(3, dtype=int))


@pytest.mark.parametrize("architecture", ["dms", "xvector", "ecapa"])
def test_onnx_says_what_torch_says_at_any_length(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_network(DialectNetwork(**{**vars(TINY), "architecture": architecture}), 3)
    assert export_onnx(model, CARD, tmp_path / "m.onnx") < 1e-5
    runtime = Runtime(tmp_path / "m.onnx")
    assert runtime.card == CARD
    features = np.random.default_rng(0).standard_normal((77, 80)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(features - features.mean(axis=0))[None])[1][0]
    assert runtime.cosines(features) == pytest.approx(expected.numpy(), abs=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]
    with pytest.raises(OutputError, match="--force"):
        export_onnx(model, CARD, tmp_path / "m.onnx")


def test_half_weights_take_half_the_room_and_say_nearly_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_network(replace(TINY, channels=64, growth=32, bottleneck=64, embedding=64), 3)
    export_onnx(model, CARD, tmp_path / "whole.onnx")
    assert 0 < export_onnx(model, CARD, tmp_path / "half.onnx", half=True) < 2e-3
    whole, half = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("whole", "half"))
    assert half < 0.7 * whole


def test_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError, match="not an ONNX model"):
        Runtime(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="there is no model"):
        Runtime(tmp_path / "none.onnx")
    foreign = tmp_path / "foreign.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    graph.output[0].name = "y"
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(foreign))
    with pytest.raises(ModelError, match="was not made by"):
        Runtime(foreign)


def test_export_that_differs_from_torch_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parrot_edge.dialect.export.TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="differs from torch"):
        export_onnx(build_network(TINY, 3), CARD, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_model_with_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names 3 labels"):
        export_onnx(build_network(TINY, 2), CARD, tmp_path / "m.onnx")
