"""A trained network to one ONNX file, checked against torch before it takes its name."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.dialect.features import BANDS, normalize
from parrot_edge.dialect.runtime import INPUT, KEY, OUTPUTS, Card, Runtime
from parrot_edge.errors import ModelError, OutputError

TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-3
"""Most that a cosine may differ from torch's, where weights have 32 and 16 bits."""

_LARGE = 1024  # numbers; smaller tensors do not matter to the size
_LENGTHS = (50, 100, 333, 1000)  # frames


def export_onnx(model: Any, card: Card, path: Path, *, force: bool = False, half: bool = False) -> float:
    """Write a `DialectModel` with its card to `path`; returns the largest difference from torch found.

    half  keep weights in 16 bits: half the file at the same speed, as they are widened once, at loading

    Raises `OutputError` where the file exists or cannot be written, and `ModelError` where the written
    model says something else than torch at any of several lengths; then no file is left.
    """
    import onnx
    import torch

    if path.exists() and not force:
        raise OutputError(f"{path} exists; choose another name or pass --force to replace it")
    partial = path.with_name(path.name + ".partial")
    model = model.to("cpu").eval()
    axes = {INPUT: {0: "batch", 1: "frames"}, **{name: {0: "batch"} for name in OUTPUTS}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own notes on its older exporter
            torch.onnx.export(
                model,
                (torch.zeros(2, 200, BANDS),),
                str(partial),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_axes=axes,
                opset_version=17,
                dynamo=False,
            )
        graph = onnx.load(str(partial))
        if half:
            _halve_weights(graph.graph)
        entry = graph.metadata_props.add()
        entry.key, entry.value = KEY, card.to_json()
        onnx.save(graph, str(partial))
        difference = _largest_difference(model, Runtime(partial))
        most = HALF_TOLERANCE if half else TOLERANCE
        if not difference <= most:
            raise ModelError(
                f"the exported model differs from torch by {difference:.2g}, more than {most}; "
                "nothing was written"
            )
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _halve_weights(graph: Any) -> None:
    """Keep the large tensors of an ONNX graph as float16, each widened where it is used."""
    from onnx import TensorProto, helper, numpy_helper

    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size >= _LARGE:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            graph.node.insert(0, helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))


def _largest_difference(model: Any, runtime: Runtime) -> float:
    import torch

    random = np.random.default_rng(0)
    worst = 0.0
    for frames in _LENGTHS:
        features = (10 + 3 * random.standard_normal((frames, BANDS))).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(normalize(features))[None])[1][0].numpy()
        worst = max(worst, float(np.abs(runtime.cosines(features) - expected).max()))
    return worst
