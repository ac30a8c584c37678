"""Linear maps over the last dimension: of whole parameters, of some of their rows, by heads."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.protocol import MEMORY_BOUND, WIDER, Direction, wide, widened

from ._call import GATHER_FROM, LayerCall, Layout, RowWeights, layouts_of
from ._products import gram_of, gram_of_positions, inner, operands, product, scaled

FEW_PRODUCTS = 2**19
"""Below this many the kernel is quicker, having fewer operations."""

KERNEL_SELECTS_FROM = 128
"""Batch size from which the kernel has the used columns alone."""


class AffineCall(LayerCall):
    """A call that is linear in its ``weight``, plus a ``bias``."""

    made_of_b = "bias_rows"

    def weight_dot(self, direction: Tensor) -> Tensor:
        raise NotImplementedError

    def weight_gradient(self, a: Tensor, b: Tensor, *, narrow: bool = False) -> Tensor:
        raise NotImplementedError

    def weight_rows(self, samples: slice) -> Tensor:
        raise NotImplementedError

    def makes_rows(self, output_shape: torch.Size) -> bool:
        """Where they do not outnumber a and b, nor does what they are made of."""
        numbers = self.input.numel() + output_shape.numel()
        return self.numbers_in_rows(output_shape) <= numbers

    def numbers_in_rows(self, output_shape: torch.Size) -> int:
        return len(self.input) * sum(p.numel() for p in self.parameters.values())

    @cached_property
    def bias_rows(self) -> Tensor:
        """Summed over positions: (B, out)."""
        raise NotImplementedError

    def dot(self, direction: Direction) -> Tensor:
        values = self.values_in(direction)
        total = self.weight_dot(values["weight"]) if "weight" in values else None
        if "bias" in values:
            bias = self.bias_rows @ values["bias"]
            return bias if total is None else total + bias
        return self.b.new_zeros(len(self.b)) if total is None else total

    def align(self, coefficients: RowWeights) -> Tensor:
        return self.dot(self.combine(coefficients, narrow=True))

    def combine(self, weights: RowWeights, *, narrow: bool = False) -> dict[Tensor, Tensor]:
        return {
            p: weights.values.to(self.bias_rows.dtype) @ self.bias_rows
            if role == "bias"
            else self.weight_gradient(*self.used_rows(weights), narrow=narrow)
            for role, p in self.parameters.items()
        }

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        return {
            p: self.bias_rows[samples] if role == "bias" else self.weight_rows(samples)
            for role, p in self.parameters.items()
        }


class LinearCall(AffineCall):
    """y = a W^T + bias over the last dimension; ``transposed`` for W stored as (in, out)."""

    is_sequence = True

    def __init__(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.transposed = transposed

    def of(self, input: Tensor) -> "LinearCall":
        """The same call in a graph that has read this, (B, in)."""
        twin = object.__new__(LinearCall)
        vars(twin).update(vars(self))
        twin.recorded = twin.input = input.detach()
        twin.version = input._version
        twin.passes_on = input.requires_grad
        return twin

    @cached_property
    def bias_rows(self) -> Tensor:
        b = self.output_gradient
        return self.b if b.ndim == 2 else b.flatten(1, -2).sum(1, dtype=wide(b.dtype))

    def weight_dot(self, direction: Tensor) -> Tensor:
        """<b_i, W a_i> = <W^T b_i, a_i>, the smaller of both."""
        a, b = operands(self.input, self.output_gradient)
        weight = direction.t() if self.transposed else direction
        if a.numel() < b.numel():
            return inner(a, mapped(b, weight), in_place=True)
        return inner(b, mapped(a, weight.t()), in_place=True)

    def combine(self, weights: RowWeights, *, narrow: bool = False) -> dict[Tensor, Tensor]:
        """Few: b times the weights once, for weight and bias."""
        a, b, parameters = self.input, self.output_gradient, self.parameters
        many = a.ndim > 2 or a.numel() + b.numel() >= GATHER_FROM
        if many or b.dtype in WIDER or "weight" not in parameters:
            return super().combine(weights, narrow=narrow)
        values = weights.values
        b = b.t() * (values if values.dtype == b.dtype else values.to(b.dtype))
        weight = a.t().mm(b.t()) if self.transposed else b.mm(a)
        result = {parameters["weight"]: weight}
        if "bias" in parameters:
            result[parameters["bias"]] = b.sum(1)
        return result

    def weight_gradient(self, a: Tensor, b: Tensor, *, narrow: bool = False) -> Tensor:
        """B^T A, in the order that needs no copy."""
        if b.ndim > 2:
            if stands_behind(a) or stands_behind(b):
                a, b = a.transpose(0, 1), b.transpose(0, 1)
            a, b = a.flatten(0, -2), b.flatten(0, -2)
        left, right = (a, b) if self.transposed else (b, a)
        return product(left.t(), right, narrow=narrow)

    def weight_rows(self, samples: slice) -> Tensor:
        a, b = operands(self.input[samples], self.output_gradient[samples])
        if a.ndim == 2:
            a, b = a.unsqueeze(1), b.unsqueeze(1)
        a, b = a.flatten(1, -2), b.flatten(1, -2)
        left, right = (a, b) if self.transposed else (b, a)
        return product(left.mT, right)

    def align(self, coefficients: RowWeights) -> Tensor:
        """By the kernel (A A^T + 1) o (B B^T), where that is less work than g_S."""
        a, b = self.input, self.output_gradient
        if a.ndim > 2 or "weight" not in self.parameters:
            return super().align(coefficients)
        batch, width_in, width_out = len(a), a.shape[1], b.shape[1]
        used = coefficients.used if batch >= KERNEL_SELECTS_FROM else None
        chosen = batch if used is None else len(used)
        by_kernel = batch * chosen * (width_in + width_out)
        by_direction = (batch + chosen) * width_in * width_out
        if by_kernel > max(by_direction, FEW_PRODUCTS):
            return super().align(coefficients)
        if b.dtype in WIDER:
            a, b = operands(a, b)
        if used is None:
            kernel = self.kernel(a, b, a, b)
            values = coefficients.values
            return kernel.mv(values if values.dtype == kernel.dtype else values.to(kernel.dtype))
        kernel = self.kernel(a, b, a.index_select(0, used), b.index_select(0, used))
        return kernel.mv(coefficients.used_values.to(kernel.dtype))

    def kernel(self, a: Tensor, b: Tensor, a_other: Tensor, b_other: Tensor) -> Tensor:
        """<g_i, g_j> of two sets of samples: (B, B')."""
        multiply = product if a.dtype in WIDER else torch.mm
        A, B = multiply(a, a_other.t()), multiply(b, b_other.t())
        return B.addcmul_(A, B) if "bias" in self.parameters else A.mul_(B)

    def gram(self) -> Tensor:
        a, b = operands(self.input, self.output_gradient)
        if "weight" not in self.parameters:
            return gram_of(self.bias_rows)
        with_bias = "bias" in self.parameters
        if a.ndim == 2:
            return self.kernel(a, b, a, b)
        a, b = a.flatten(1, -2), b.flatten(1, -2)
        (batch, length, width_in), width_out = a.shape, b.shape[-1]
        by_positions = (batch * length) ** 2 * (width_in + width_out)
        by_rows = batch * (length + batch) * width_in * width_out
        if by_positions <= by_rows:
            return gram_of_positions(a, b, lambda a, other: product(a, other.T) + with_bias)
        gram = (
            gram_of(self.bias_rows) if with_bias else a.new_zeros(batch, batch, dtype=wide(a.dtype))
        )
        step = max(1, MEMORY_BOUND // (batch * width_in))
        for some in b.split(step, dim=-1):  # rows of the weight, a block at a time
            gram = gram + gram_of(product(some.mT, a))
        return gram


def mapped(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix``, in the memory's order."""
    matrix = matrix.to(rows.dtype)
    if rows.ndim == 2:
        return product(rows, matrix)
    if stands_behind(rows):
        return mapped(rows.transpose(0, 1), matrix).transpose(0, 1)
    return product(rows.flatten(0, -2), matrix).view(*rows.shape[:-1], -1)


def stands_behind(rows: Tensor) -> bool:
    """Whether samples stand behind positions in memory, as in (T, B, d)."""
    return rows.ndim == 3 and rows.stride(0) < rows.stride(1)


class LinearRowsCall(LinearCall):
    """A linear map with some rows of a parameter, as in attention's input projection."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        whole = [None if t is None else t if t._base is None else t._base for t in (weight, bias)]
        super().__init__(input, *whole)
        self.slices = {}
        for role, part in (("weight", weight), ("bias", bias)):
            if part is not None:
                skipped = part.storage_offset() - self.roles[role].storage_offset()
                start = skipped // part.stride(0)
                self.slices[role] = slice(start, start + len(part))

    def values_in(self, direction: Direction) -> dict[str, Tensor]:
        return {r: v[self.slices[r]] for r, v in super().values_in(direction).items()}

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        return self.among_zeros(super().rows(samples))

    def combine(self, weights: RowWeights, *, narrow: bool = False) -> dict[Tensor, Tensor]:
        return self.among_zeros(super().combine(weights, narrow=narrow))

    def among_zeros(self, parts: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        each = [(p, self.slices[role]) for role, p in self.parameters.items()]
        return {
            p: F.pad(parts[p], (*[0, 0] * (p.ndim - 1), rows.start, len(p) - rows.stop))
            for p, rows in each
        }


class HeadsCall(LayerCall):
    """y_h = a_h W_h for a of shape (heads, rows, in) and W of shape (heads, in, out)."""

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        found = layouts_of(output_shape[1:2], batch_size, is_sequence=True)
        return tuple(layout._replace(dim=1) for layout in found)

    def dot(self, direction: Direction) -> Tensor:
        (parameter,) = self.parameters.values()
        if parameter not in direction:
            return self.b.new_zeros(len(self.b))
        a, b = self._sides()
        return inner(b, a @ direction[parameter].to(a.dtype), in_place=True)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        (parameter,) = self.parameters.values()
        a, b = self._sides()
        a, b = (side.transpose(0, 1).flatten(1, 2) for side in (a, scaled(b, weights.values)))
        return {parameter: product(a.mT, b)}

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        (parameter,) = self.parameters.values()
        a, b = self._sides()
        return {parameter: widened(a[samples].mT @ b[samples])}

    def _sides(self) -> tuple[Tensor, Tensor]:
        """As (B, heads, positions, width)."""
        a, b = operands(self.input, self.output_gradient)
        return (a.unsqueeze(2), b.unsqueeze(2)) if a.ndim == 3 else (a, b)
