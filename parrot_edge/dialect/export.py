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

TOLERANCE = 1e-4
"""Most that a cosine may differ from torch's."""

_LENGTHS = (50, 100, 333, 1000)  # frames


def export_onnx(model: Any, card: Card, path: Path, *, force: bool = False) -> float:
    """Write a `DialectModel` with its card to `path`; returns the largest difference from torch found.

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
        entry = graph.metadata_props.add()
        entry.key, entry.value = KEY, card.to_json()
        onnx.save(graph, str(partial))
        difference = _largest_difference(model, Runtime(partial))
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the exported model differs from torch by {difference:.2g}, more than {TOLERANCE}; "
                "nothing was written"
            )
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return difference


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
