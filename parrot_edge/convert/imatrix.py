"""The importance matrix: how much each column of a matrix matters to what a role says.

It is the mean of the squares of what a column is multiplied by (llama.cpp's `llama-imatrix`), over the
dialogues that the model is for. A quantiser that knows it spends its precision where it is heard. Files
are those of `llama-imatrix`, and either's can be read by the other. It needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parrot_edge.convert.files import GgufFile, import_gguf, read_gguf, write_gguf
from parrot_edge.data.sources import Reader, is_held_out
from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.ggml import Product
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.native import read_metadata
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.errors import InputError, ModelError, UsageError
from parrot_edge.roles import NATIVE, SYSTEM_KEY, AskPrompt, ask_view
from parrot_edge.train.data import LEARNED

TOKENS = 20_000
"""Tokens that are read for a matrix where nothing else is said."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNK = 512  # tokens that llama-imatrix counts as one; it only divides by it to report progress


@dataclass(frozen=True)
class Importance:
    """What a tensor was multiplied by: `sums` of squares, float32 (matrices, columns), over `counts` rows,
    float32 (matrices,). Of experts that were never chosen both are 0."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Mean squares, float32 (matrices, columns); 1 for a matrix that nothing went through."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importance of every tensor by its name, and the names of the data that it comes from."""

    tensors: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """The most rows that went through any tensor's matrices."""
        return max((int(each.counts.max()) for each in self.tensors.values()), default=0)


def compute_imatrix(
    model: Path,
    dialogues: Iterable[Sequence[Message]],
    role: str,
    *,
    tokens: int = TOKENS,
    threads: int | None = None,
    datasets: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> ImportanceMatrix:
    """Read dialogues with the GGUF `model` as `role` ("ask" or "chat") does, until `tokens` were read.

    Half of the weight is on the rows from which the role's own words are predicted, what closes a turn
    included, and half on all that are read: their keys and values are what the role attends to. Turns
    beyond the model's context are left out. `on_progress` hears how many tokens were read so far. Raises
    `InputError` where no dialogue holds a turn of the role, and `ModelError` for a model that cannot be
    read.
    """
    gatherer = _Gatherer()
    prompt = _prompt_of(model, role)
    read = turns = 0
    with Likelihood(model, threads=threads, observer=gatherer) as likelihood:
        for messages in dialogues:
            if read >= tokens:
                break
            longest = 0
            for position, message in enumerate(messages):
                if message.role != LEARNED[role]:
                    continue
                view = ask_view(Seed(""), messages[:position], prompt) if prompt else messages[:position]
                ids, start = likelihood.encode(view, message.role, message.content.strip())
                if len(ids) > likelihood.tokens:
                    break
                likelihood.log_probs(ids, start)
                turns, longest = turns + 1, len(ids)
            read += longest
            on_progress(read)
    if not turns:
        raise InputError(
            f"no dialogue holds a turn of the {LEARNED[role]} that fits the context; give others"
        )
    return ImportanceMatrix(gatherer.tensors(), tuple(datasets))


def draw_dialogues(sources: Sequence[str], *, held_out: float, seed: int = 0) -> list[tuple[Message, ...]]:
    """The dialogues of some sources, in an order drawn by `seed`, without those that a recipe with the
    same `data.held_out` keeps back: a certificate measures on them. Rows that cannot be used are skipped."""
    reader = Reader(sources, skip=True)
    groups = {
        dialogue.group: dialogue.messages
        for dialogue in reader.dialogues()
        if not (held_out and is_held_out(dialogue, held_out))
    }
    return [groups[group] for group in sorted(groups, key=lambda group: derive_seed(seed, group))]


def write_imatrix(matrix: ImportanceMatrix, target: Path, *, force: bool = False) -> None:
    """Write a matrix as the GGUF that llama-quantize takes with --imatrix.

    Raises `OutputError` where `target` exists without `force`, or cannot be written.
    """
    types = import_gguf().GGUFValueType
    with write_gguf(target, "imatrix", force=force) as writer:
        writer.add_type("imatrix")
        writer.add_key_value("imatrix.datasets", list(matrix.datasets) or [""], types.ARRAY, types.STRING)
        writer.add_uint32("imatrix.chunk_count", -(-matrix.rows // _CHUNK))
        writer.add_uint32("imatrix.chunk_size", _CHUNK)
        for name, importance in sorted(matrix.tensors.items()):
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(importance.sums, np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(importance.counts[:, None], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """A matrix in the GGUF form of llama-imatrix; raises `ModelError` where the file is none."""
    source = read_gguf(path)
    if source.get("general.type") != "imatrix":
        raise ModelError(f"{path} is no importance matrix; make one from dialogues, or with llama-imatrix")
    names = [name.removesuffix(_SUMS) for name in source.tensors if name.endswith(_SUMS)]
    datasets = [name.decode("utf-8", "replace") for name in source.get("imatrix.datasets", []) if name]
    tensors = {name: _read_importance(source, name, path) for name in names}
    if not tensors:
        raise ModelError(f"{path} holds no importance of any tensor; make it again")
    return ImportanceMatrix(tensors, tuple(datasets))


def check_imatrix(matrix: ImportanceMatrix, model: GgufFile, path: Path) -> None:
    """Raise `UsageError` where a matrix was made of another model than that of `path`."""
    for name, importance in matrix.tensors.items():
        shape = model.tensors[name].shape if name in model.tensors else ()
        if len(shape) < 2 or importance.sums.size != shape[-1] * int(np.prod(shape[:-2])):
            raise UsageError(f"the importance matrix has {name}, which does not fit {path}; make it anew")


def _read_importance(source: GgufFile, name: str, path: Path) -> Importance:
    sums, counts = source.tensors[name + _SUMS], source.tensors.get(name + _COUNTS)
    if counts is None:
        raise ModelError(f"{path} has no counts of {name}; the importance matrix is damaged, make it again")
    values, number = sums.floats(), counts.floats().ravel()
    if len(number) == 1:  # as matrices of one tensor that are multiplied together are counted
        number = np.repeat(number, len(values))
    if len(number) != len(values) or not (np.isfinite(values).all() and np.isfinite(number).all()):
        raise ModelError(f"{path} has no usable numbers for {name}; make the importance matrix again")
    return Importance(values, number)


def _prompt_of(model: Path, role: str) -> AskPrompt | None:
    """How the model is prompted as Ask; None for Chat, which reads the messages as they are."""
    if role not in LEARNED:
        raise UsageError(f"{role!r} is no role; it is ask or chat")
    if role == "chat":
        return None
    system = read_metadata(model).get(SYSTEM_KEY)
    return AskPrompt(native=True, system=system) if system else NATIVE


class _Gatherer:
    """An observer that sums squares: of all rows, and of those whose logits are wanted."""

    def __init__(self) -> None:
        self._all: dict[str, Importance] = {}
        self._wanted: dict[str, Importance] = {}

    def __call__(self, product: Product) -> None:
        every = np.ones_like(product.wanted)
        for gathered, rows in ((self._all, every), (self._wanted, product.wanted)):
            if product.name not in gathered:
                shape = product.matrices, product.inputs.shape[1]
                gathered[product.name] = Importance(np.zeros(shape), np.zeros(shape[0]))
            inputs, matrix = product.inputs[rows], product.matrix[rows]
            for index in np.unique(matrix):
                chosen = inputs[matrix == index]
                gathered[product.name].sums[index] += np.square(chosen).sum(axis=0, dtype=np.float64)
                gathered[product.name].counts[index] += len(chosen)

    def tensors(self) -> dict[str, Importance]:
        """The mean of both, counted over all rows; an expert that no wanted row chose has but the one.

        Raises `ModelError` where a number is none, or beyond float32.
        """
        return {name: _blend(name, every, self._wanted[name]) for name, every in self._all.items()}


def _blend(name: str, every: Importance, wanted: Importance) -> Importance:
    one, other = every.means, np.where(wanted.counts[:, None] > 0, wanted.means, every.means)
    sums = (one + other) / 2 * every.counts[:, None]
    if not (sums <= np.finfo(np.float32).max).all():
        raise ModelError(f"the model's activations at {name} are no numbers; convert it again")
    return Importance(sums.astype(np.float32), every.counts.astype(np.float32))
