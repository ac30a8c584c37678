"""Layers that are linear in their parameters theta, and the products for one call of a layer.

With input a_i and output gradient b_i = d(loss_i)/d(output_i), two products need no B x P tensor::

    <g_i, v>        = <b_i, layer(a_i; v)>                 dot
    sum_i w_i g_i   = d/dtheta <w b, layer(a; theta)>      combine

`apply` alone is enough to be exact; the rest is for speed.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from irw_optim.gradients.protocol import Direction, wide, widened

from ._products import gram_of_rows, inner, operands, scaled

GATHER_FROM = 2**17
"""Numbers from which it pays to gather the rows that have a weight."""


class Layout(NamedTuple):
    """Where the batch stands, whatever the sizes."""

    dim: int
    # Folded: "batch major" (B * T), "batch minor" (T * B), "between" (T * B * inner).
    fold: str = ""
    inner: int = 1

    def bring(self, tensor: Tensor, batch_size: int) -> Tensor:
        dim, fold, inner = self
        if fold == "between":
            tensor = tensor.unflatten(dim, (-1, batch_size, inner)).movedim(dim + 1, 0)
            return tensor.flatten(dim + 1, dim + 2)
        if fold == "batch major":
            tensor = tensor.unflatten(dim, (batch_size, -1))
        elif fold == "batch minor":
            tensor, dim = tensor.unflatten(dim, (-1, batch_size)), dim + 1
        return tensor.movedim(dim, 0) if dim else tensor


FIRST = Layout(0)


def layouts_of(
    shape: torch.Size, batch_size: int, is_sequence: bool, time_major: bool = False
) -> tuple[Layout, ...]:
    """Where the batch may be, by these leading dimensions alone."""
    if not shape:
        return ()
    if time_major:
        if len(shape) > 1:
            return (Layout(1),) if shape[1] == batch_size else ()
        return (Layout(0, "batch minor"),) if batch_size and shape[0] % batch_size == 0 else ()
    if not is_sequence:
        return (FIRST,) if shape[0] == batch_size else ()
    sizes = enumerate(shape)
    found = [Layout(dim) if dim else FIRST for dim, size in sizes if size == batch_size]
    if batch_size == 1:  # all is of the one sample
        return (found[0] if found else Layout(0, "batch major"),)
    for dim, size in enumerate(shape[:2]):
        if batch_size and size > batch_size and size % batch_size == 0:
            found += [Layout(dim, "batch major"), Layout(dim, "batch minor")]
    return tuple(found)


@dataclass
class RowWeights:
    """The weights of the B rows, (B,), and which rows have any."""

    values: Tensor

    @cached_property
    def used(self) -> Tensor | None:
        """Indices of these; None for nearly all, or where to look would wait, or be traced."""
        if self.values.device.type != "cpu" or type(self.values) is not Tensor:
            return None
        used = self.values.nonzero().squeeze(1)
        return used if len(used) < 0.8 * len(self.values) else None

    @cached_property
    def used_values(self) -> Tensor:
        return self.values if self.used is None else self.values.index_select(0, self.used)


class LayerCall:
    """One call of a layer: its input, its trainable parameters by role, later its b.

    Args:
        input: what the layer read.
        **parameters: the layer's tensors by role (``weight``, ``bias``).
    """

    is_sequence = False  # whether all leading positions are treated alike
    features = 1  # trailing dimensions of a sequence that are no positions
    needs_autograd_combine = False  # whether autograd alone gives the right layout
    time_major = False  # whether the batch is known not to stand first
    hands_back: GradientEdge | None = None  # where its `input_gradient` goes, if made of b
    may_lack_batch = False  # whether one input may serve all samples
    output_shape: torch.Size | None = None  # as which the output is seen; None for its own
    made_of_b = ""  # a property that is made of b, and kept
    layout: Layout | None = None  # where the batch was found,
    batch_size = -1  # and for which B it was looked for

    def __init__(self, input: Tensor, **parameters: Tensor | None) -> None:
        self.recorded = self.input = input.detach()
        self.version = input._version
        self.passes_on = input.requires_grad
        self.roles: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        for role, parameter in parameters.items():
            if parameter is not None:
                self.roles[role] = parameter
                if parameter.requires_grad:
                    self.parameters[role] = parameter
        self.output_gradient: Tensor = self.input  # until `set_output_gradient`

    def input_gradient(self) -> Tensor:
        """That of the input as it was read."""
        raise NotImplementedError

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        """Where the batch may be, in input and output alike."""
        leading = len(output_shape) - self.features if self.is_sequence else 1
        positions = self.recorded.shape[:leading]
        alike = output_shape[:leading] == positions
        return layouts_of(positions, batch_size, self.is_sequence, self.time_major) if alike else ()

    def settle(self, layout: Layout | None, batch_size: int) -> None:
        """Bring the input's batch to the front; None for no batch."""
        self.layout, self.batch_size, self.input = layout, batch_size, self.recorded
        if layout is not None and layout is not FIRST:
            self.input = layout.bring(self.recorded, batch_size)

    def arrangement(self) -> tuple[object, ...]:
        """What an earlier proof depends on."""
        return self.layout, self.recorded.ndim

    def for_every_sample(self, batch_size: int, dim: int) -> "LayerCall | None":
        """As if each had made the call, with the batch in ``dim``."""
        return None

    def set_output_gradient(self, gradient: Tensor) -> None:
        """Take b, of which the products are made."""
        layout = self.layout
        if layout is not None and layout is not FIRST:
            gradient = layout.bring(gradient, self.batch_size)
        self.output_gradient = gradient
        self.__dict__.pop(self.made_of_b, None)

    def let_go(self) -> None:
        nothing = self.input.new_empty(0, *self.input.shape[1:])  # a slice would hold the storage
        self.recorded = self.input = self.output_gradient = nothing
        self.__dict__.pop(self.made_of_b, None)

    def without(self, dropped: Tensor) -> "LayerCall":
        """A copy with zeros for the rows ``dropped``, (B,) bool."""
        part = self.copy()
        if self.input.is_floating_point() and len(self.input) == len(dropped):
            part.input = zeroed(self.input, dropped)  # both a and b: 0 times NaN is NaN
        part.output_gradient = zeroed(self.output_gradient, dropped)
        part.__dict__.pop(self.made_of_b, None)
        return part

    def forget_values(self) -> None:
        """Of parameters, which a sharded layer frees."""

    def copy(self) -> "LayerCall":
        return copy(self)

    @property
    def precision(self) -> torch.dtype:
        return self.output_gradient.dtype

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The output for other values of the parameters."""
        raise NotImplementedError

    def makes_rows(self, output_shape: torch.Size) -> bool:
        """Whether rows of G are quick to make, and no larger than a and b."""
        return False

    def dot(self, direction: Direction) -> Tensor:
        values = self.values_in(direction)
        if not values:
            return self.b.new_zeros(len(self.b))
        output = self.apply(widened(self.input), self.completed(values))
        fresh = type(output) is Tensor and output.is_contiguous()  # one that is traced has no place
        fresh = fresh and output.data_ptr() not in {v.data_ptr() for v in values.values()}
        return inner(self.b, output, in_place=fresh)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return self.transpose(self.input, scaled(self.b, weights.values))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        """The gradients of single samples: (b, *p.shape) by parameter."""

        def row(a: Tensor, b: Tensor) -> list[Tensor]:
            return list(self.transpose(a.unsqueeze(0), b.unsqueeze(0)).values())

        blocks = torch.vmap(row)(self.input[samples], self.b[samples])
        return dict(zip(self.parameters.values(), blocks, strict=True))

    def align(self, coefficients: RowWeights) -> Tensor:
        """G (G^T c)."""
        return self.dot(self.combine(coefficients))

    def gram(self) -> Tensor:
        return gram_of_rows([self])

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        """d/dtheta <b, layer(input; theta)>: the adjoint of `apply`."""
        roles = list(self.parameters)

        def output(*values: Tensor) -> Tensor:
            given = dict(zip(roles, values, strict=True))
            return self.apply(widened(input), self.completed(given))

        # Their values are not read, and may be gone.
        zeros = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in self.parameters.values()]
        adjoint = torch.func.vjp(output, *zeros)[1]
        return dict(zip(self.parameters.values(), adjoint(b), strict=True))

    @property
    def b(self) -> Tensor:
        return widened(self.output_gradient)

    def values_in(self, direction: Direction) -> dict[str, Tensor]:
        return {role: direction[p] for role, p in self.parameters.items() if p in direction}

    def completed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(values.values()))
        zeros = {r: like.new_zeros(p.shape) for r, p in self.roles.items() if r not in values}
        return {**zeros, **values}

    def used_rows(self, weights: RowWeights) -> tuple[Tensor, Tensor]:
        """Both sides of the rows that count, the smaller one times the weights."""
        a, b, values = self.input, self.output_gradient, weights.values
        used = weights.used if a.numel() + b.numel() >= GATHER_FROM else None
        gathered = used is not None
        if used is not None:
            a, b, values = a.index_select(0, used), b.index_select(0, used), weights.used_values
        a, b = operands(a, b)
        if a.numel() < b.numel():
            return scaled(a, values, in_place=gathered), b
        return a, scaled(b, values, in_place=gathered)


def zeroed(rows: Tensor, dropped: Tensor) -> Tensor:
    """With zeros in the rows ``dropped``."""
    return rows.masked_fill(dropped.view(-1, *[1] * (rows.ndim - 1)), 0.0)
