"""The door between gradients and weights: three products with G, the matrix of all gradients.

G has one row per sample, g_i, and one column per trainable number: (B, P). It is built only by
`MaterializedGradients`: the reference, and Opacus' ``grad_sample``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Direction: TypeAlias = Mapping[Tensor, Tensor]
"""A vector of P numbers: for each parameter a tensor of its shape. Missing ones count as 0."""


@runtime_checkable
class PerSampleGradients(Protocol):
    """The per-sample gradients of one batch, as the matrix G of shape (B, P)."""

    @property
    def batch_size(self) -> int:
        """B, the number of rows of G."""

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w for ``weights`` of shape (B,): one tensor per parameter."""

    def dot(self, direction: Direction) -> Tensor:
        """G v for a direction v: shape (B,), in float32 or better."""

    def gram(self) -> Tensor:
        """G G^T: shape (B, B), in float32 or better."""


class StackedGradients:
    """Engines side by side, each with its parameters: G = [G_1 | G_2 | ...].

    What the last one pushes forwards may be in doubt.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self.parts = list(parts)
        self.batch_size = self.parts[0].batch_size
        self.seed: Tensor | None = getattr(self.parts[0], "seed", None)

    @property
    def doubt(self) -> Sequence[Tensor]:
        return getattr(self.parts[-1], "doubt", ())

    def adds_up(self, sides: Tensor) -> bool:
        return bool(self.parts[-1].adds_up(sides))

    def settle_doubt(self) -> None:
        self.parts[-1].settle_doubt()

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return {p: t for part in self.parts for p, t in part.combine(weights).items()}

    def dot(self, direction: Direction) -> Tensor:
        return added(part.dot(direction) for part in self.parts)

    def gram(self) -> Tensor:
        return added(part.gram() for part in self.parts)

    def align(self, coefficients: Tensor) -> Tensor:
        return added(align(part, coefficients) for part in self.parts)


def added(products: Iterable[Tensor]) -> Tensor:
    """One after the other: all are too large to hold."""
    each = iter(products)
    return sum(each, start=next(each))


def align(gradients: PerSampleGradients, coefficients: Tensor) -> Tensor:
    """G (G^T c), shape (B,), by the engine's own ``align`` if it has a shorter way."""
    shorter = getattr(gradients, "align", None)
    if shorter is not None:
        return shorter(coefficients)  # type: ignore[no-any-return]
    return gradients.dot(gradients.combine(coefficients))


MEMORY_BOUND = 64 * 2**20
"""Numbers that a block of `gram` may hold (256 MiB in float32)."""


class MaterializedGradients:
    """G as explicit ``rows``, one block of shape (B, *p.shape) per parameter p.

    >>> G = MaterializedGradients.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> G.gram()
    tensor([[ 5., 11.],
            [11., 25.]])
    >>> G.dot(G.combine(torch.tensor([1.0, 0.0])))
    tensor([ 5., 11.])
    """

    def __init__(self, rows: Mapping[Tensor, Tensor]) -> None:
        if not rows:
            raise ValueError("rows is empty: expected the gradients of at least one parameter")
        sizes = {len(block) for block in rows.values()}
        if len(sizes) > 1:
            raise ValueError(f"rows have batch sizes {sorted(sizes)}: expected one batch size")
        self.rows = dict(rows)
        self.batch_size = sizes.pop()

    @classmethod
    def of(cls, matrix: Tensor) -> "MaterializedGradients":
        """A plain matrix G of shape (B, P), of one "parameter" of P numbers."""
        if matrix.ndim != 2:
            raise ValueError(f"gradients has shape {tuple(matrix.shape)}: expected (B, P)")
        return cls({matrix.new_zeros(matrix.shape[1]): matrix})

    @classmethod
    def from_grad_sample(cls, parameters: Iterable[Tensor]) -> "MaterializedGradients":
        """Read ``p.grad_sample`` as Opacus' GradSampleModule or GradSampleHooks left it.

        Raises:
            RuntimeError: a parameter lacks it, or has those of several backward passes.
        """
        rows: dict[Tensor, Tensor] = {}
        for parameter in parameters:
            block = getattr(parameter, "grad_sample", None)
            if isinstance(block, list):
                if len(block) > 1:
                    raise RuntimeError(
                        f"grad_sample holds {len(block)} backward passes: call "
                        "optimizer.zero_grad() after each optimizer.step(losses=losses)"
                    )
                block = block[0] if block else None
            if block is not None:
                rows[parameter] = block
            elif parameter.requires_grad and parameter.grad is not None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient but no "
                    "grad_sample: Opacus does not cover its layer; give IRWOptimizer the plain "
                    "model (model=model, criterion=criterion)"
                )
        if not rows:
            raise RuntimeError(
                "no parameter has a grad_sample: wrap the model first, "
                "model = opacus.GradSampleModule(model), and call backward before step"
            )
        return cls(rows)

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        combined = {}
        for p, block in self.rows.items():
            matrix = as_matrix(block)
            sums = (weights.to(matrix.dtype) @ matrix).view(numbers_of(block).shape[1:])
            combined[p] = torch.view_as_complex(sums) if block.is_complex() else sums
        return combined

    def dot(self, direction: Direction) -> Tensor:
        chosen = [p for p in self.rows if p in direction]
        if not chosen:
            return as_matrix(widened(next(iter(self.rows.values())))).new_zeros(self.batch_size)
        return added(
            as_matrix(widened(self.rows[p])) @ as_vector(widened(direction[p])) for p in chosen
        )

    def gram(self) -> Tensor:
        blocks = [as_matrix(widened(block)) for block in self.rows.values()]
        return added(block @ block.T for block in blocks)


def blocked_gram(
    batch_size: int, numbers: int, rows: Callable[[slice], Mapping[Tensor, Tensor]]
) -> Tensor:
    """G G^T from ``rows(samples)`` of so many ``numbers`` each, two blocks at a time."""
    step = max(1, MEMORY_BOUND // max(1, 2 * numbers))
    blocks = [slice(start, min(start + step, batch_size)) for start in range(0, batch_size, step)]
    gram: Tensor | None = None
    for number, i in enumerate(blocks):
        left = rows(i)
        for j in blocks[: number + 1]:
            right = left if i == j else rows(j)
            product = added(
                as_matrix(widened(g)) @ as_matrix(widened(right[p])).T for p, g in left.items()
            )
            if gram is None:
                gram = product.new_zeros(batch_size, batch_size)
            gram[i, j] = product
            gram[j, i] = product.T
    assert gram is not None, "a batch without samples has no gradients"
    return gram


def as_matrix(block: Tensor) -> Tensor:
    """(B, ...) as (B, P) real numbers, for scalars and empty batches too.

    A complex number counts as two: the loss changes by Re(conj(a) b).
    """
    block = numbers_of(block)
    return block.flatten(1) if block.ndim > 1 else block.unsqueeze(1)


def as_vector(tensor: Tensor) -> Tensor:
    """One row of `as_matrix`, (P,)."""
    return numbers_of(tensor).flatten()


def numbers_of(tensor: Tensor) -> Tensor:
    """Complex ones as pairs, in a further dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widened(tensor: Tensor) -> Tensor:
    """At least float32: half-precision products lose the sign of a small score."""
    wider = WIDER.get(tensor.dtype)
    return tensor if wider is None else tensor.to(wider)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of what `widened` gives."""
    return WIDER.get(dtype, dtype)


WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
