"""Where the batch is in one output of an operation, and in a tensor of another shape."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cached_property
from math import prod
from typing import Any, NoReturn

from irw_optim.gradients.nodes import signed

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
    """What a node computed, and where the batch is in it.

    Args:
        node: of the graph.
        number: which of its outputs.
        stride: of the batch, in numbers.
        batch_size: B.
    """

    def __init__(self, node: Any, number: int, stride: int, batch_size: int) -> None:
        self.node = node
        self.number = number
        self.stride = stride
        self.batch_size = batch_size
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
        """The dimension that holds the batch, and the stride inside it; None for several."""
        right = 1
        for dim in reversed(range(len(self.shape))):
            wider = right * self.shape[dim]
            if right <= self.stride and self.stride * self.batch_size <= wider:
                return None if self.stride % right else (dim, self.stride // right)
            right = wider
        return None

    @property
    def dim(self) -> int:
        """The dimension that holds the batch."""
        return (self.located or mixes())[0]

    def beside(self, touched: Container[int]) -> int:
        """The dimension that holds the batch, which is none of those that are worked along."""
        return mixes() if self.dim in touched else self.dim

    def saved_dims(self, name: str = "_saved_dim", ndim: int | None = None) -> list[int]:
        """Dimensions that the node remembers, counted from the front; all where it does not."""
        value = getattr(self.node, name, None)
        values = value if isinstance(value, tuple | list) else [value]
        size = len(self.shape) if ndim is None else ndim
        dims = [signed(d) % size if size else 0 for d in values if d is not None]
        return dims or list(range(size))

    def at(self, shape: Sequence[int], dim: int) -> int:
        """The stride of the batch in a tensor that holds it in ``dim`` as the output does."""
        own, stride = self.located or mixes()
        if not shape:
            return SHARED
        if not 0 <= dim < len(shape) or shape[dim] != self.shape[own]:
            raise MixesError
        return stride * prod(shape[dim + 1 :])

    def broadcast(self, shape: Sequence[int]) -> int:
        """The stride of the batch in a tensor that is broadcast to the output."""
        dim = self.dim - len(self.shape) + len(shape)
        return SHARED if dim < 0 or shape[dim] == 1 else self.at(shape, dim)

    def all_at(self, dim: int) -> Sequence[int]:
        """The answer where every input holds the batch in ``dim``."""
        return [self.at(shape, dim) for shape in self.inputs]


Rule = Callable[[Output], Sequence[int]]
