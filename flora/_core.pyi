"""Types of the extension. Its docstrings have the formulas; `flora.reference` has a twin of every function."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

class _SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

_Array: TypeAlias = Tensor | NDArray[np.floating[Any]] | _SupportsDLPack

class ArrayError(BufferError, ValueError): ...

class _Info(TypedDict):
    isa: str
    isa_available: list[str]
    threads: int
    pool: str
    exchange_api: bool
    outruns_mkl: bool

def tucker_linear_forward(
    y: _Array, h: _Array | None, x: _Array, u_in: _Array, core: _Array | None, u_out: _Array, scale: float, /
) -> None: ...
def tucker_linear_backward(
    dx: _Array | None,
    d_u_in: _Array | None,
    d_core: _Array | None,
    d_u_out: _Array | None,
    dy: _Array,
    x: _Array | None,
    h: _Array | None,
    u_in: _Array,
    core: _Array | None,
    u_out: _Array,
    scale: float,
    /,
) -> None: ...
def tucker_conv_forward(
    y: _Array,
    h: _Array | None,
    x: _Array,
    core: _Array,
    factors: Sequence[_Array | None],
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    /,
) -> None: ...
def tucker_conv_backward(
    dx: _Array | None,
    d_core: _Array | None,
    d_factors: Sequence[_Array | None],
    dy: _Array,
    x: _Array | None,
    h: _Array | None,
    core: _Array,
    factors: Sequence[_Array | None],
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    /,
) -> None: ...
def conv_weight_gradient(
    d_weight: _Array,
    dy: _Array,
    x: _Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    /,
) -> None: ...
def conv_input_gradient(dx: _Array, dy: _Array, weight: _Array, padding: Sequence[int], /) -> None: ...
def tucker_reconstruct(
    out: _Array, weight: _Array | None, core: _Array, factors: Sequence[_Array | None], scale: float, /
) -> None: ...
def tucker_reconstruct_backward(
    d_core: _Array | None,
    d_factors: Sequence[_Array | None],
    d_weight: _Array,
    core: _Array,
    factors: Sequence[_Array | None],
    scale: float,
    /,
) -> None: ...
def kronecker_forward(y: _Array, h: _Array | None, x: _Array, a: _Array, b: _Array, scale: float, /) -> None: ...
def kronecker_backward(
    dx: _Array | None,
    d_a: _Array | None,
    d_b: _Array | None,
    dy: _Array,
    x: _Array | None,
    h: _Array | None,
    a: _Array,
    b: _Array,
    scale: float,
    /,
) -> None: ...
def kronecker_reconstruct(out: _Array, weight: _Array | None, a: _Array, b: _Array, scale: float, /) -> None: ...
def kronecker_reconstruct_backward(
    d_a: _Array | None, d_b: _Array | None, d_weight: _Array, a: _Array, b: _Array, scale: float, /
) -> None: ...
def rescale_reconstruct(
    out: _Array, weight: _Array, row: _Array | None, column: _Array | None, scale: float, /
) -> None: ...
def rescale_backward(
    d_row: _Array | None,
    d_column: _Array | None,
    d_weight: _Array,
    weight: _Array,
    row: _Array | None,
    column: _Array | None,
    scale: float,
    /,
) -> None: ...
def toeplitz_reconstruct(
    out: _Array, weight: _Array | None, left: _Array, right: _Array | None, scale: float, /
) -> None: ...
def toeplitz_reconstruct_backward(
    d_left: _Array | None,
    d_right: _Array | None,
    d_weight: _Array,
    left: _Array,
    right: _Array | None,
    scale: float,
    /,
) -> None: ...
def toeplitz_forward(y: _Array, x: _Array, left: _Array, right: _Array | None, scale: float, /) -> None: ...
def toeplitz_backward(
    dx: _Array | None,
    d_left: _Array | None,
    d_right: _Array | None,
    dy: _Array,
    x: _Array | None,
    left: _Array,
    right: _Array | None,
    scale: float,
    /,
) -> None: ...
def rescale_linear_backward(
    d_row: _Array | None,
    d_column: _Array | None,
    dy: _Array,
    x: _Array,
    weight: _Array,
    row: _Array | None,
    column: _Array | None,
    scale: float,
    /,
) -> None: ...
def multiply(out: _Array, a: _Array, b: _Array, /) -> None: ...
def drop(out: _Array, probability: float, seed: int, /) -> None: ...
def takes(x: object, weight: object, bias: object, parameters: tuple[object, ...], /) -> bool: ...
def info() -> _Info: ...
def set_isa(name: str, /) -> None: ...
