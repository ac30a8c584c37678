"""Autograd's nodes as functions: what they read and make, and where the batch is in it."""

import re
from collections.abc import Callable, Container, Sequence
from functools import cached_property
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

COPY = "torch::autograd::CopySlices"  # into a view

_BASE_NAMES: dict[type[Node], str] = {}

_SUFFIX = re.compile(r"Backward\d*$")
"""``TanhBackwardBackward0`` is no ``Tanh``."""


def base_name(node: Node) -> str:
    """``Mean`` for ``MeanBackward1``; none for functions in Python."""
    name = _BASE_NAMES.get(type(node))
    if name is None:
        in_python = isinstance(node, BackwardCFunction)
        name = "" if in_python else _SUFFIX.sub("", node.name())
        _BASE_NAMES[type(node)] = name
    return name


def shape_in(metadata: Any) -> torch.Size:
    """Of one tensor; () of a nested one, whose rows have lengths of their own."""
    return torch.Size(() if metadata.is_nested_tensor else metadata.shape)


def shape_of(node: Any, output: int = 0) -> torch.Size:
    """The shape of what a node computed."""
    return shape_in(node._input_metadata[output])


def read_by(node: Any, number: int) -> Any:
    """Shape, dtype and device of what a node read; None for what needs no gradient."""
    parent, output = node.next_functions[number]
    return None if parent is None else parent._input_metadata[output]


def signed(value: Any) -> Any:
    """Nodes keep negative numbers as unsigned."""
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


def saved(node: Any, name: str) -> Any:
    """What a node remembers under a name, `signed`; tuples as lists."""
    value = getattr(node, f"_saved_{name}")
    return list(map(signed, value)) if isinstance(value, tuple | list) else signed(value)


def pull(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of a node's inputs, for those of its outputs."""
    if isinstance(node, BackwardCFunction):
        return _pull_in_python(node, gradients)
    results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


def slopes_of(node: Any) -> Sequence[Tensor | None]:
    """The same for ones at the first output."""
    output, *others = node._input_metadata
    ones = torch.ones(output.shape, dtype=output.dtype, device=output.device)
    return pull(node, [ones, *[None] * len(others)])


def _pull_in_python(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """They expect zeros where nothing arrived, and answer for every argument."""
    arrived = [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
        for g, m in zip(gradients, node._input_metadata, strict=True)
    ]
    results = node.apply(*arrived)
    results = results if isinstance(results, tuple) else (results,)
    edges = node.next_functions  # of tensors alone
    if len(results) == len(edges):
        return results
    needed = iter([r for r, need in zip(results, node.needs_input_grad, strict=False) if need])
    return [None if parent is None else next(needed) for parent, _ in edges]


def is_block(node: Any) -> bool:
    """Whether a slice is of adjacent rows, behind a multiple of as many."""
    rows = (*shape_of(node), 0)[0]
    if node._saved_dim != 0 or node._saved_step != 1 or not rows:
        return False
    return bool(signed(node._saved_start or 0) % rows == 0)


def picks_of(node: Any) -> tuple[str, ...]:
    """What advanced indices take of each dimension."""
    rows, indices = (*shape_of(node), 0)[0], node._saved_indices
    ndim = max((index.ndim for index in indices if index is not None), default=0)
    kinds = []
    for index in indices:
        every = index is not None and index.ndim == ndim and _is_every_row(index, rows)
        kinds.append("whole" if index is None else "every row" if every else "index")
    return tuple(kinds)


def _is_every_row(index: Tensor, rows: int) -> bool:
    if index.dtype == torch.bool or index.ndim < 1 or index.shape[0] != rows:
        return False
    if index.numel() and index.is_cpu and int(index[-1].flatten()[-1]) != rows - 1:
        return False
    column = torch.arange(rows, device=index.device).view(-1, *[1] * (index.ndim - 1))
    return bool((index == column).all())


SHARED = 0
"""The place of what has no batch."""

UNREAD = -1
"""The place in what this output was not computed from."""


class MixesError(Exception):
    """The samples may meet here."""


def mixes() -> NoReturn:
    """Say so."""
    raise MixesError


class Output:
    """What a node computed as one of its outputs, and the stride of the batch in it."""

    def __init__(self, node: Any, number: int, stride: int, batch_size: int) -> None:
        self.node = node
        self.number = number
        self.stride = stride
        self.batch_size = batch_size
        if node._input_metadata[number].is_nested_tensor:
            mixes()  # no stride tells the samples apart
        self.shape: Sequence[int] = node._input_metadata[number].shape

    @cached_property
    def inputs(self) -> list[Sequence[int]]:
        """The shapes of what the node read; () for what needs no gradient."""
        return [
            () if parent is None else parent._input_metadata[number].shape
            for parent, number in self.node.next_functions
        ]

    @cached_property
    def located(self) -> tuple[int, int] | None:
        """The batch's dimension, and the stride inside it; None for several."""
        right = 1
        for dim in reversed(range(len(self.shape))):
            wider = right * self.shape[dim]
            if right <= self.stride and self.stride * self.batch_size <= wider:
                return None if self.stride % right else (dim, self.stride // right)
            right = wider
        return None

    @cached_property
    def dim(self) -> int:
        return (self.located or mixes())[0]

    def beside(self, touched: Container[int]) -> int:
        """`dim`, where that is none of those worked along."""
        return mixes() if self.dim in touched else self.dim

    def saved_dims(self, name: str = "_saved_dim", ndim: int | None = None) -> list[int]:
        """Those that the node remembers, counted from the front; or all."""
        value = getattr(self.node, name, None)
        values = value if isinstance(value, tuple | list) else [value]
        size = len(self.shape) if ndim is None else ndim
        dims = [signed(d) % size if size else 0 for d in values if d is not None]
        return dims or list(range(size))

    def at(self, shape: Sequence[int], dim: int) -> int:
        """The stride in a tensor that holds the batch in ``dim`` as the output does."""
        own, stride = self.located or mixes()
        if not shape:
            return SHARED
        if 0 in shape:
            return UNREAD  # there are no numbers
        if not 0 <= dim < len(shape) or shape[dim] != self.shape[own]:
            raise MixesError
        return stride * prod(shape[dim + 1 :])

    def broadcast(self, shape: Sequence[int]) -> int:
        """The stride in a tensor that is broadcast to the output."""
        dim = self.dim - len(self.shape) + len(shape)
        return SHARED if dim < 0 or shape[dim] == 1 else self.at(shape, dim)

    def all_at(self, dim: int) -> Sequence[int]:
        """The answer where every input holds the batch in ``dim``."""
        return [self.at(shape, dim) for shape in self.inputs]


Rule = Callable[[Output], Sequence[int]]
