"""Per-sample gradients that exist as rows in memory: the reference, and Opacus' ``grad_sample``.

Costs B x P numbers. Every other engine gives the same three products without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from irw_optim.gradients.protocol import Direction, added

MEMORY_BOUND = 64 * 2**20
"""Numbers that a block of `gram` may hold at once (256 MiB in float32)."""


class MaterializedGradients:
    """G as explicit rows, one block of shape (B, *p.shape) per parameter p.

    Args:
        rows: for each parameter its per-sample gradients, (B, *p.shape).

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
    def of(cls, matrix: Tensor) -> MaterializedGradients:
        """Wrap a plain matrix G of shape (B, P); its one "parameter" is a vector of P numbers."""
        if matrix.ndim != 2:
            raise ValueError(f"gradients has shape {tuple(matrix.shape)}: expected (B, P)")
        return cls({matrix.new_zeros(matrix.shape[1]): matrix})

    @classmethod
    def from_grad_sample(cls, parameters: Iterable[Tensor]) -> MaterializedGradients:
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
                    "model (model=model, criterion=criterion) instead"
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
    """G G^T from rows that are made a block of samples at a time.

    Two blocks of rows, of so many ``numbers`` each, stay below `MEMORY_BOUND`; for every pair of
    blocks ``rows(samples) -> {parameter: (b, *p.shape)}`` is called again rather than kept.
    """
    step = max(1, min(batch_size, MEMORY_BOUND // max(1, 2 * numbers)))
    blocks = [slice(start, min(start + step, batch_size)) for start in range(0, batch_size, step)]
    gram: Tensor | None = None
    for i in blocks:
        left = rows(i)
        for j in blocks:
            if j.start > i.start:
                break
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

    A complex number counts as its two parts: their inner product is Re(conj(a) b), which is what a
    step along a complex gradient changes the loss by.
    """
    block = numbers_of(block)
    return block.flatten(1) if block.ndim > 1 else block.unsqueeze(1)


def as_vector(tensor: Tensor) -> Tensor:
    """One row of `as_matrix`, (P,)."""
    return numbers_of(tensor).flatten()


def numbers_of(tensor: Tensor) -> Tensor:
    """The tensor as real numbers: complex ones as pairs, in a further dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widened(tensor: Tensor) -> Tensor:
    """At least float32: half-precision products lose the sign of a small score."""
    wider = WIDER.get(tensor.dtype)  # asked for at every turn
    return tensor if wider is None else tensor.to(wider)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what `widened` gives."""
    return WIDER.get(dtype, dtype)


WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
