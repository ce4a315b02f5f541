"""What the matrices of a model are multiplied by, told while llama.cpp computes.

`llama_cpp` does not declare ggml's tensors, so their layout stands here, as ggml.h of the pinned version has
it. It knows nothing of what the numbers are for; `native` brings contexts and models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import llama_cpp.llama_cpp as C
import numpy as np

from parrot_edge.errors import ModelError

_F32 = 0  # enum ggml_type
_OBJECT = 32  # bytes that ggml keeps before each tensor, sizeof(struct ggml_object)


@dataclass(frozen=True)
class Product:
    """A matrix of the model, and the rows that it was multiplied by.

    name      of the tensor, "blk.0.attn_q.weight"
    matrices  how many matrices the tensor holds: experts, or 1
    inputs    float32 (rows, columns)
    matrix    int64 (rows,): which of the matrices each row went to
    wanted    bool (rows,): whether the logits of the row's token are wanted; all where rows are no tokens
    """

    name: str
    matrices: int
    inputs: np.ndarray
    matrix: np.ndarray
    wanted: np.ndarray


Observer = Callable[[Product], None]


class _Tensor(ctypes.Structure):
    pass


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class Watch:
    """Calls an observer for each matrix of the model's blocks that a context multiplies.

    `callback` is what llama.cpp is given; the watch must live as long as the context. Only contexts
    with one sequence keep the tokens in the order of the batch, which `wanted` rests on. Raises
    `ModelError` where this llama.cpp has other tensors than those known here.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._error: BaseException | None = None
        self._wanted = np.zeros(0, np.bool_)
        self._library = _declare(C._lib)
        if self._library.ggml_tensor_overhead() != ctypes.sizeof(_Tensor) + _OBJECT:
            raise ModelError(
                "this llama.cpp lays its tensors out in another way than the version that belongs here; "
                "install the llama-cpp-python that it asks for"
            )
        names = {self._library.ggml_op_name(number): number for number in range(64)}
        self._dense, self._experts = names[b"MUL_MAT"], names[b"MUL_MAT_ID"]
        self.callback = C.ggml_backend_sched_eval_callback(self._on_node)

    def expect(self, wanted: np.ndarray) -> None:
        """Say of which tokens of the decode to come the logits are wanted: bool (T,)."""
        self._wanted = wanted.astype(np.bool_)

    def check(self) -> None:
        """Raise what the observer raised during a decode: C has no exceptions to pass on."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _on_node(self, address: int, asks: bool, _: object) -> bool:
        """llama.cpp asks before it computes a node whether it is to be shown; False afterwards ends the
        decode."""
        try:
            if self._error is not None:
                return False
            node = _Tensor.from_address(address)
            if asks:
                return self._is_product(node)
            self._observer(self._read(node))
            return True
        except BaseException as error:  # Ctrl-C as well
            self._error = error
            return False

    def _is_product(self, node: _Tensor) -> bool:
        if node.op not in (self._dense, self._experts) or node.src[1].contents.type != _F32:
            return False
        name = _name_of(node.src[0].contents)
        return name.startswith("blk.") and name.endswith(".weight")

    def _read(self, node: _Tensor) -> Product:
        weight = node.src[0].contents
        inputs = self._copy(node.src[1], np.float32)  # (.., rows, columns), four dimensions
        outer, inner = weight.ne[3], weight.ne[2]
        columns = inputs.shape[-1]
        if node.op == self._experts:
            chosen = self._copy(node.src[2], np.int32)[0, 0]  # (T, used)
            inputs = np.broadcast_to(inputs[0], (*chosen.shape, columns)).reshape(-1, columns)
            matrix = chosen.reshape(-1).astype(np.int64)
            wanted = np.repeat(self._wanted_of(len(chosen)), chosen.shape[1])
        else:
            batches = (inputs.shape[0] // outer, outer, inputs.shape[1] // inner, inner)
            grouped = inputs.reshape(*batches, -1, columns).transpose(1, 3, 0, 2, 4, 5)
            wanted = np.tile(self._wanted_of(inputs.shape[2]), inputs.shape[0] * inputs.shape[1])
            inputs = grouped.reshape(-1, columns)
            matrix = np.repeat(np.arange(outer * inner), len(inputs) // (outer * inner))
        return Product(_name_of(weight), outer * inner, inputs, matrix, wanted)

    def _wanted_of(self, rows: int) -> np.ndarray:
        """Behind the last attention, llama.cpp goes on with those tokens alone whose logits are wanted."""
        return self._wanted if rows == len(self._wanted) else np.ones(rows, np.bool_)

    def _copy(self, pointer: ctypes._Pointer[_Tensor], dtype: type) -> np.ndarray:
        """A tensor's numbers, wherever they are held: four dimensions, the columns last."""
        tensor = pointer.contents
        data = np.empty(self._library.ggml_nbytes(pointer), np.uint8)
        self._library.ggml_backend_tensor_get(pointer, data.ctypes.data, 0, data.nbytes)
        strides = tuple(tensor.nb[::-1])
        return np.ndarray(tuple(tensor.ne[::-1]), dtype, data.data, strides=strides).copy()


def _name_of(tensor: _Tensor) -> str:
    """The tensor's name; a copy on another device is called DEVICE#name#0."""
    name = tensor.name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The functions of ggml that are called here, with their types."""
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_op_name.restype = ctypes.c_char_p
    library.ggml_op_name.argtypes = [ctypes.c_int]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.POINTER(_Tensor)]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.POINTER(_Tensor),
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    return library
