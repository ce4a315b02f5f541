"""A trained network as one ONNX file, run by ONNX Runtime: no torch.

The file holds its labels, its calibration and where it comes from in its metadata, under `KEY`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.dialect.calibration import Calibration
from parrot_edge.dialect.features import normalize
from parrot_edge.errors import ModelError, UsageError

DEMONSTRATION = Path(__file__).parent / "demonstration"
"""Folder of the model that comes with the package, and its card; it learned from synthesisers."""

KEY = "parrot_edge.dialect"
"""The metadata entry that makes an ONNX file one of ours."""

FORMAT = 1

INPUT, OUTPUTS = "features", ("embedding", "cosines")
"""Names within the file: normalised features (B, F, 80) to (B, E) and (B, L)."""

_LONGEST_FRAMES = 6000  # a minute


@dataclass(frozen=True)
class Card:
    """What a model file says of itself.

    split  how recordings were held back while it was trained: `held_out`, `seed` and `sources`; empty
           where they came from a corpus of their own
    """

    name: str
    labels: tuple[str, ...]
    calibration: Calibration
    split: dict[str, Any]

    def to_json(self) -> str:
        """As it is written into the file."""
        calibration = {**vars(self.calibration), "offsets": list(self.calibration.offsets)}
        record = {"format": FORMAT, "name": self.name, "labels": list(self.labels), "split": self.split}
        return json.dumps({**record, "calibration": calibration}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Raises `ValueError` or `KeyError` for what `to_json` did not write."""
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise ValueError("another format")
        values = record["calibration"]
        calibration = Calibration(values["scale"], tuple(values["offsets"]), values["unknown_below"])
        return cls(record["name"], tuple(record["labels"]), calibration, record["split"])


class Runtime:
    """A model file that is ready to run, on so many threads.

    Raises `ModelError` where the file is no ONNX file or was not made by `parrot dialect`.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UsageError("dialects need onnxruntime; run pip install 'parrot-edge[dialect]'") from None
        path = Path(path)
        if path.is_dir():
            path = path / "model.onnx"
        if not path.is_file():
            raise ModelError(f"there is no model {path}; train one with `parrot dialect train`")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # else memory grows with every new length
        options.enable_mem_pattern = False
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base but this
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path} is not an ONNX model that can be run ({reason})") from None
        try:
            self.card = Card.from_json(self._session.get_modelmeta().custom_metadata_map[KEY])
        except (KeyError, ValueError, TypeError):
            raise ModelError(f"{path} was not made by this version of `parrot dialect export`") from None
        self.labels, self.calibration = self.card.labels, self.card.calibration
        if self._session.get_outputs()[1].shape[-1] != len(self.labels):
            raise ModelError(f"{path} names {len(self.labels)} labels and scores another number of them")

    def cosines(self, features: np.ndarray) -> np.ndarray:
        """What the network says of log-mel features, float32 (F, 80), before calibration: float64 (L,)."""
        batch = normalize(features[:_LONGEST_FRAMES]).astype(np.float32)[None]  # (1, F, 80)
        return self._session.run([OUTPUTS[1]], {INPUT: batch})[0][0].astype(float)
