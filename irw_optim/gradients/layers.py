"""Layers that are linear in their parameters, and the three products for one call of a layer.

With input a_i, output gradient b_i = d(loss_i)/d(output_i) and parameters theta, such a layer has

    <g_i, v>        = <b_i, layer(a_i; v)>                 dot: the layer run with v as parameters
    sum_i w_i g_i   = d/dtheta <w b, layer(a; theta)>      combine: the layer's own weight gradient

so neither needs a B x P tensor. Each class below is one kind of call; `apply` alone is enough to
be exact, the other methods are there where a kind has something cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.materialized import MEMORY_BOUND, as_matrix, blocked_gram, widened
from irw_optim.gradients.protocol import Direction

GATHER_FROM = 2**16
"""From this many input numbers on, rows of weight 0 are left out of `combine`: below it the
gather costs more than the rows."""


class LayerCall:
    """One call of a layer: its input, its trainable parameters by role, later its b.

    Args:
        input: what the layer read; the batch is dimension 0.
        **parameters: the layer's tensors by role (``weight``, ``bias``); those that do not
            require a gradient are left out.
    """

    needs_autograd_combine = False
    """Whether only autograd gives the gradient in the layout that inner optimizers expect."""

    def __init__(self, input: Tensor, **parameters: Tensor | None) -> None:
        self.input = input.detach()
        self.version = input._version
        self.parameters = {
            role: p for role, p in parameters.items() if p is not None and p.requires_grad
        }
        self.output_gradient = self.input.new_empty(0)

    def set_output_gradient(self, gradient: Tensor) -> None:
        """Take b; the products are defined from then on."""
        self.output_gradient = gradient

    def fits(self, batch_size: int, output_shape: torch.Size) -> bool:
        """Whether the batch is the first dimension of what the layer read and computed."""
        return self.input.shape[:1] == (batch_size,) == output_shape[:1]

    # What a kind of layer must say ------------------------------------------------------------

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The layer's output for other parameter values; a missing role counts as zero."""
        raise NotImplementedError

    # The three products -----------------------------------------------------------------------

    def dot(self, direction: Direction) -> Tensor:
        """<g_i, v>, shape (B,)."""
        values = self.values_in(direction)
        return inner(self.b, self.apply(widened(self.input), values))

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """Sum of w_i g_i by parameter."""
        return self.transpose(self.input, self.weighted_b(weights))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        """The per-sample gradients of some samples: (b, *p.shape) by parameter."""
        one_sample = lambda a, b: self.transpose(a.unsqueeze(0), b.unsqueeze(0))  # noqa: E731
        return torch.vmap(one_sample)(self.input[samples], self.b[samples])  # type: ignore[no-any-return]

    def gram(self) -> Tensor:
        """<g_i, g_j>, shape (B, B), a block of rows at a time."""
        return gram_of_rows([self])

    # Shared steps -----------------------------------------------------------------------------

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        """d/dtheta <b, layer(input; theta)>: the adjoint of `apply`."""
        roles = list(self.parameters)

        def output(*values: Tensor) -> Tensor:
            return self.apply(widened(input), dict(zip(roles, values, strict=True)))

        zeros = [torch.zeros_like(widened(p.detach())) for p in self.parameters.values()]
        _, adjoint = torch.func.vjp(output, *zeros)
        return dict(zip(self.parameters.values(), adjoint(b), strict=True))

    @property
    def b(self) -> Tensor:
        return widened(self.output_gradient)

    def weighted_b(self, weights: Tensor) -> Tensor:
        return self.b * along_batch(weights, self.b)

    def values_in(self, direction: Direction) -> dict[str, Tensor]:
        return {role: direction[p] for role, p in self.parameters.items() if p in direction}

    def used_rows(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weighted b of the rows that count, where leaving out the others pays."""
        if self.input.numel() >= GATHER_FROM:
            used = weights.nonzero().squeeze(1)
            if len(used) < 0.8 * len(weights):
                b = widened(self.output_gradient[used])
                return widened(self.input[used]), b * along_batch(weights[used], b)
        return widened(self.input), self.weighted_b(weights)


class LinearCall(LayerCall):
    """y = a W^T + bias over the last dimension; ``transposed`` for W stored as (in, out)."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.transposed = transposed

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        bias = values.get("bias")
        if "weight" not in values:
            return torch.zeros_like(self.b) if bias is None else bias.expand_as(self.b)
        weight = values["weight"].T if self.transposed else values["weight"]
        return F.linear(input, weight, bias)

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return self.transpose(*self.used_rows(weights))

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        a, b = input.flatten(0, -2), b.flatten(0, -2)
        result: dict[Tensor, Tensor] = {}
        if "weight" in self.parameters:
            weight = a.T @ b if self.transposed else b.T @ a
            result[self.parameters["weight"]] = weight
        if "bias" in self.parameters:
            result[self.parameters["bias"]] = b.sum(0)
        return result

    def gram(self) -> Tensor:
        a, b = widened(self.input), self.b
        if "weight" not in self.parameters:
            return gram_of(b.flatten(1, -2).sum(1) if b.ndim > 2 else b)
        with_bias = "bias" in self.parameters
        if a.ndim == 2:
            return (a @ a.T + with_bias) * (b @ b.T)
        a, b = a.flatten(1, -2), b.flatten(1, -2)
        (batch, length, width_in), width_out = a.shape, b.shape[-1]
        by_positions = (batch * length) ** 2 * (width_in + width_out)
        by_rows = batch * (length + batch) * width_in * width_out
        if by_positions <= by_rows:
            return gram_of_positions(a, b, with_bias)
        gram = gram_of(b.sum(1)) if with_bias else b.new_zeros(batch, batch)
        step = max(1, MEMORY_BOUND // (batch * width_in))
        for some in b.split(step, dim=-1):  # the per-sample weight gradient, some outputs at once
            gram = gram + gram_of(torch.bmm(some.mT, a))
        return gram


class ConvolutionCall(LayerCall):
    """Convolutions and transposed ones of any dimension, in the terms of ``aten.convolution``."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.weight = weight.detach()
        self.settings = list(settings.values())
        self.channels_out = weight.shape[1] * settings["groups"] if settings["transposed"] else len(weight)

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        bias = values.get("bias")
        if "weight" not in values:
            shape = (-1, *[1] * (self.b.ndim - 2))
            return torch.zeros_like(self.b) if bias is None else bias.view(shape).expand_as(self.b)
        return torch.ops.aten.convolution(input, values["weight"], bias, *self.settings)  # type: ignore[no-any-return]

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return self.transpose(*self.used_rows(weights))

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        wanted = [False, "weight" in self.parameters, "bias" in self.parameters]
        _, *gradients = torch.ops.aten.convolution_backward(
            b, widened(input), widened(self.weight), [self.channels_out], *self.settings, wanted
        )
        roles = zip(("weight", "bias"), gradients, strict=True)
        return {self.parameters[r]: g for r, g in roles if r in self.parameters}


class EmbeddingCall(LayerCall):
    """Rows of a table looked up by index."""

    def __init__(self, input: Tensor, weight: Tensor, padding_idx: int | None, sparse: bool) -> None:
        super().__init__(input, weight=weight)
        self.table = weight.shape
        self.padding_idx = padding_idx
        self.needs_autograd_combine = sparse

    @property
    def b(self) -> Tensor:
        """Padding has no gradient, whatever the output gradient there."""
        b = super().b
        if self.padding_idx is None:
            return b
        return b * (self.input != self.padding_idx).unsqueeze(-1)

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return F.embedding(input, values["weight"]) if values else torch.zeros_like(self.b)

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        table = b.new_zeros(self.table)
        table = table.index_add(0, input.flatten(), b.reshape(-1, self.table[1]))
        return {self.parameters["weight"]: table}

    def gram(self) -> Tensor:
        index = self.input.reshape(len(self.input), -1)
        b = self.b.reshape(*index.shape, -1)
        return gram_of_lookups(index, b)


class EmbeddingBagCall(LayerCall):
    """Sums or means of looked-up rows; the indices may be flat, with offsets."""

    def __init__(self, input: Tensor, weight: Tensor, sparse: bool, **settings: Any) -> None:
        super().__init__(input, weight=weight)
        self.settings = settings
        self.needs_autograd_combine = sparse

    def fits(self, batch_size: int, output_shape: torch.Size) -> bool:
        return output_shape[:1] == (batch_size,)  # the indices may be flat, with offsets

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if not values:
            return torch.zeros_like(self.b)
        # Half or float, integers stay as they are: `widened` is the identity on indices.
        return F.embedding_bag(input, values["weight"], **self.settings)

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        basis = torch.eye(len(self.b), dtype=self.b.dtype, device=self.b.device)[samples]
        table = [self.combine(one)[self.parameters["weight"]] for one in basis]
        return {self.parameters["weight"]: torch.stack(table)}


class NormCall(LayerCall):
    """An affine map after a normalisation: few parameters, so their rows are made once and kept.

    Args:
        input: what the layer read.
        normalised: the input after normalisation, before the affine map.
        dims: the dimensions of the output that the parameters span.
    """

    def __init__(
        self,
        input: Tensor,
        normalise: Any,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.normalise = normalise
        self.dims = dims
        self._rows: dict[Tensor, Tensor] | None = None

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        if self._rows is None:
            b = self.b
            others = [d for d in range(1, b.ndim) if d not in self.dims]
            over = lambda t: t.sum(others) if others else t  # noqa: E731
            self._rows = {}
            if "weight" in self.parameters:
                normalised = self.normalise(widened(self.input))
                self._rows[self.parameters["weight"]] = over(b * normalised)
            if "bias" in self.parameters:
                self._rows[self.parameters["bias"]] = over(b)
        return {p: block[samples] for p, block in self._rows.items()}

    def dot(self, direction: Direction) -> Tensor:
        products = [as_matrix(g) @ direction[p].flatten() for p, g in self.rows().items() if p in direction]
        return sum(products) if products else self.b.new_zeros(len(self.b))  # type: ignore[return-value]

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return {p: (weights.to(g.dtype) @ as_matrix(g)).view(p.shape) for p, g in self.rows().items()}


def along_batch(weights: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1) in the dtype of ``like``."""
    return weights.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products, shape (B,)."""
    product = left * right
    return product.flatten(1).sum(1)


def gram_of(rows: Tensor) -> Tensor:
    """R R^T of per-sample rows (B, ...)."""
    matrix = as_matrix(rows)
    return matrix @ matrix.T


def gram_of_rows(calls: list[LayerCall]) -> Tensor:
    """G G^T of the parameters that these calls share, from rows a block of samples at a time.

    Needed where several calls meet in one parameter: g_i is then a sum over calls.
    """
    parameters = {p for call in calls for p in call.parameters.values()}
    numbers = sum(p.numel() for p in parameters)
    return blocked_gram(len(calls[0].b), numbers, lambda samples: _summed_rows(calls, samples))


def _summed_rows(calls: list[LayerCall], samples: slice) -> dict[Tensor, Tensor]:
    total: dict[Tensor, Tensor] = {}
    for call in calls:
        for p, block in call.rows(samples).items():
            total[p] = total[p] + block if p in total else block
    return total


def gram_of_positions(a: Tensor, b: Tensor, with_bias: bool) -> Tensor:
    """sum over t, t' of (<a_it, a_jt'> + bias) <b_it, b_jt'>, a block of samples i at a time."""
    batch, length = a.shape[:2]
    step = max(1, MEMORY_BOUND // max(1, 2 * batch * length * length))
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    blocks = []
    for some_a, some_b in zip(a.split(step), b.split(step), strict=True):
        products = some_a.flatten(0, 1) @ flat_a.T
        products = (products + with_bias) * (some_b.flatten(0, 1) @ flat_b.T)
        blocks.append(products.view(len(some_a), length, batch, length).sum((1, 3)))
    return torch.cat(blocks)


def gram_of_lookups(index: Tensor, b: Tensor) -> Tensor:
    """sum over t, t' with equal index of <b_it, b_jt'>, a block of samples i at a time."""
    batch, length = index.shape
    step = max(1, MEMORY_BOUND // max(1, 2 * batch * length * length))
    flat_index, flat_b = index.flatten(), b.flatten(0, 1)
    blocks = []
    for some_index, some_b in zip(index.split(step), b.split(step), strict=True):
        same = some_index.reshape(-1, 1) == flat_index
        products = same * (some_b.flatten(0, 1) @ flat_b.T)
        blocks.append(products.view(len(some_index), length, batch, length).sum((1, 3)))
    return torch.cat(blocks)
