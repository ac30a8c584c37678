"""A change that is pushed forwards through a graph, beside plain autograd: one row of J after the
other, from one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irw_optim.gradients.backward_passes import BackwardPasses
from irw_optim.gradients.graph import walk
from irw_optim.gradients.nodes import base_name

SHORT = 10


class Case(NamedTuple):
    """Something that is computed from tensors.

    Attributes:
        name: of the test.
        function: gets as many tensors as there are shapes.
        shapes: of the tensors, which are leaves; or the tensors, or makers of modules.
        dtype: of the tensors.
        tolerance: relative to the largest number.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10

    def arguments(self) -> list[Any]:
        """Tensors with a gradient, and modules with parameters, the same at every call."""
        torch.manual_seed(20)
        return [self._argument(shape) for shape in self.shapes]

    def _argument(self, shape: Any) -> Any:
        if isinstance(shape, tuple):
            return torch.randn(shape, dtype=self.dtype, requires_grad=True)
        if isinstance(shape, Tensor):
            return shape.detach().clone().requires_grad_()
        return shape().to(self.dtype)


def case(name: str, function: Callable[..., Any], *shapes: Any, **settings: Any) -> Case:
    return Case(name, function, shapes, **settings)


def in_single(name: str, function: Callable[..., Any], *shapes: Any) -> Case:
    """Of an operation that torch fuses in float32 alone."""
    return Case(name, function, shapes, torch.float32, 1e-4)


def leaves_of(arguments: Sequence[Any]) -> list[Tensor]:
    return [
        leaf
        for argument in arguments
        for leaf in (argument.parameters() if isinstance(argument, nn.Module) else [argument])
    ]


def numbers(result: Any) -> Tensor:
    """All that was computed with a gradient, as a short real vector."""
    parts = [part.reshape(-1) for part in _real_parts(result)]
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    if len(found) <= SHORT:
        return found
    return torch.randn(SHORT, len(found), dtype=found.dtype) @ found


def _real_parts(result: Any) -> Iterator[Tensor]:
    if isinstance(result, list | tuple):
        for part in result:
            yield from _real_parts(part)
    elif isinstance(result, Tensor) and result.requires_grad:
        yield torch.view_as_real(result.resolve_conj()) if result.is_complex() else result


def names_in(output: Tensor) -> set[str]:
    """The operations that lead to something."""
    return {base_name(node) for node in walk(output).order}


def rows_of(output: Tensor, leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradient of every number of the output, for every leaf."""
    rows = []
    for number in output:
        gradients = torch.autograd.grad(number, leaves, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, leaves, strict=True)
        rows.append([torch.zeros_like(p) if g is None else g.to_dense() for g, p in pairs])
    return rows


def assert_pushed(output: Tensor, leaves: Sequence[Tensor], tolerance: float) -> None:
    """The change along a direction of all leaves, and along one of each."""
    rows = rows_of(output, leaves)
    direction = [torch.randn_like(leaf) for leaf in leaves]
    for chosen in _choices(len(leaves)):
        terms = [[(row[n].conj() * direction[n]).real.sum() for n in chosen] for row in rows]
        expected = torch.tensor([sum(t) for t in terms], dtype=output.dtype)
        passes = BackwardPasses(output, walk(output), {})
        pushed = passes.push({leaves[n]: direction[n] for n in chosen})
        assert pushed.shape == output.shape
        assert pushed.dtype == output.dtype
        scale = max([1.0, *[row[n].abs().max() for row in rows for n in chosen if row[n].numel()]])
        torch.testing.assert_close(pushed, expected, rtol=0.0, atol=tolerance * float(scale))


def _choices(count: int) -> list[list[int]]:
    """All; each alone, or the first and the others where there are many."""
    every = list(range(count))
    if count < 2:
        return [every]
    return [every, *([[n] for n in every] if count < 6 else [every[:1], every[1:]])]


@contextmanager
def unless_torch_lacks_it() -> Iterator[None]:
    """Older torch has no kernel, or no derivative, for some of what the newer one has."""
    try:
        yield
    except RuntimeError as error:
        lacks = "No available kernel" in str(error) or "is not implemented" in str(error)
        if torch.__version__ >= (2, 13) or not lacks:
            raise
        pytest.skip(str(error).partition("\n")[0])


def assert_case(case: Case, *, checkpointed: bool = False) -> None:
    """With a gradient of all that is read, and of one tensor alone."""
    arguments = case.arguments()
    leaves = leaves_of(arguments)
    for places in _choices(len(leaves)):
        for place, leaf in enumerate(leaves):
            leaf.requires_grad_(place in places)
        chosen = [leaves[place] for place in places]
        torch.manual_seed(21)
        if checkpointed:
            result = checkpoint(case.function, *arguments, use_reentrant=False)
        else:
            result = case.function(*arguments)
        assert_pushed(numbers(result), chosen, case.tolerance)
