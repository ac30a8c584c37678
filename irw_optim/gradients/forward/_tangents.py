"""What rules are given, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

Tangents: TypeAlias = Sequence[Tensor | None]
"""A change for each input of a node, in the order of ``node.next_functions``; None for none."""

Changes: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""The change of the first output, or of each; None for "not by this rule"."""

ForwardRule: TypeAlias = Callable[[Any, Tangents], Changes]


def of_one(rule: Callable[[Any, Tensor], Changes]) -> ForwardRule:
    """A rule for operations that read one tensor, which is given its change."""

    def of_node(node: Any, tangents: Tangents) -> Changes:
        (change,) = (t for t in tangents if t is not None)
        return rule(node, change)

    return of_node


def added(*terms: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None
