"""What rules are given and what they give; and J t of any operation, where there is no rule.

u -> J^T u is what a node does. It is linear, so its derivative by u, along t, is J t, at any u.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from irw_optim.gradients.nodes import base_name, pull

Tangents: TypeAlias = Sequence[Tensor | None]
"""A change for each input of a node, in the order of ``node.next_functions``; None for none."""

Changes: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""The change of the first output, or of each; None for "not by this rule"."""

ForwardRule: TypeAlias = Callable[[Any, Tangents], Changes]


def of_one(rule: Callable[[Any, Tensor], Changes]) -> ForwardRule:
    """A rule for operations that read one tensor, which is given its change."""

    def of_node(node: Any, tangents: Tangents) -> Changes:
        (change,) = tangents if len(tangents) == 1 else [t for t in tangents if t is not None]
        return rule(node, change)  # type: ignore[arg-type]

    return of_node


def added(*terms: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def transposed(node: Any, tangents: Tangents) -> Tangents:
    """The changes of a node's outputs, one for each.

    Raises:
        RuntimeError: there is no double backward, or a function in Python hides what its gradient
            depends on.
    """
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    with torch.enable_grad():
        seeds = [_seed(node, metadata).requires_grad_() for metadata in node._input_metadata]
        pulled = pull(node, seeds)
        if base_name(node) == _COPIED_IN:
            written = _copied_in if len(tangents) == 2 else _filled_in
            copied = written(seeds[0].detach(), pulled, tangents)
            if copied is not None:
                return [copied]
        gradients, directions = [], []
        for number, tangent in changing:
            gradient = pulled[number]
            if gradient is not None and gradient.requires_grad:
                gradients.append(gradient)
                directions.append(tangent.to(gradient.dtype).expand(gradient.shape))
            elif gradient is not None and gradient.any():
                raise RuntimeError(_SAYS_NOT)
        if not gradients:
            return [None for _ in seeds]
        found = torch.autograd.grad(gradients, seeds, directions, allow_unused=True)
    pushed = [(c, u) for c, u in zip(found, seeds, strict=True) if c is not None]
    if _may_hide(node) and not _add_up(pushed, list(zip(directions, gradients, strict=True))):
        raise RuntimeError(_SAYS_NOT)
    return [None if change is None else change.detach() for change in found]


_SAYS_NOT = "its gradient does not depend as it should on what it is given"


def _may_hide(node: Node) -> bool:
    """Functions in Python may detach what they are given; copies into views may call such."""
    return base_name(node) in ("", _COPIED_IN)


_COPIED_IN = "torch::autograd::CopySlices"


def _copied_in(numbers: Tensor, pulled: Tangents, tangents: Tangents) -> Tensor | None:
    """The change where numbers were copied into a view, which shows in where their own come from.

    Of several numbers in one place, or where they were changed on the way, it says nothing.
    """
    into, put = tangents
    rest, copied = (None if p is None else p.detach().flatten() for p in pulled)
    line = numbers.flatten()
    if copied is None or not len(copied):
        return None
    if len(line) > _MOST_APART or line.dtype not in (torch.float32, torch.float64):
        return None
    where = torch.searchsorted(line, copied).clamp_(max=len(line) - 1)
    if not torch.equal(line[where], copied) or (rest is not None and rest[where].any()):
        return None
    found = torch.zeros_like(line) if into is None else into.flatten().index_fill(0, where, 0.0)
    if put is not None:  # one row may have been written to many
        found.index_copy_(0, where, put.to(line.dtype).expand(pulled[1].shape).flatten())  # type: ignore[union-attr]
    return found.view(numbers.shape)


def _filled_in(numbers: Tensor, pulled: Tangents, tangents: Tangents) -> Tensor | None:
    """The change where a view was filled with constants: nothing there, elsewhere as it was."""
    (rest, *more), (into, *_) = pulled, tangents
    if more or rest is None or into is None or numbers.numel() > _MOST_APART:
        return None
    if numbers.dtype not in (torch.float32, torch.float64):
        return None
    kept = rest.detach() == numbers
    return into * kept if bool((kept | (rest.detach() == 0)).all()) else None


def _seed(node: Node, metadata: Any) -> Tensor:
    shape: Sequence[int] = metadata.shape
    options: Any = {"dtype": metadata.dtype, "device": metadata.device}
    if _may_hide(node):  # no two alike, and none made of others: what is linear is seen to be
        make = _different if prod(shape) <= _MOST_KEPT else _different.__wrapped__
        return make(prod(shape), metadata.dtype, metadata.device).view(shape).clone()
    if base_name(node) == "Logcumsumexp":  # its backward takes a logarithm
        return torch.ones(shape, **options)
    return torch.zeros(shape, **options)


@lru_cache(maxsize=1)
def _different(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers from 0.5 to 1.5, each larger than the one before."""
    wide = torch.promote_types(dtype, torch.float32).to_real()
    steps = torch.arange(count, dtype=wide, device=device)
    numbers = (steps * 0.6180339887498949).frac_().div_(2).add_(steps)
    return numbers.div_(max(1, count)).add_(0.5).to(dtype)


_MOST_APART = 2**20
"""Of so many, float32 holds all apart."""

_MOST_KEPT = 2**16
"""Numbers that are kept for the next operation of the same shape."""

_Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def _add_up(pushed: _Pairs, pulled: _Pairs) -> bool:
    """Whether <J t, u> = <t, J^T u>."""
    (left, _), (right, size) = _inner(pushed), _inner(pulled)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(pulled[0][0].dtype, 1e-1)
    return bool(torch.as_tensor(left - right).abs() <= tolerance * size)


def _inner(pairs: _Pairs) -> tuple[Tensor | float, Tensor | float]:
    """A sum of products, and that of their sizes."""
    terms = [(a.detach().conj() * b.detach()).real for a, b in pairs]
    return sum(t.sum() for t in terms), sum(t.abs().sum() for t in terms)
