"""Where the rules are kept, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

Tangents: TypeAlias = Sequence[Tensor | None]
"""A change for each input of a node, in the order of ``node.next_functions``; None for none."""

Changes: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""The change of the first output, or of each; None for "not by this rule"."""

ForwardRule: TypeAlias = Callable[[Any, Tangents], Changes]

FORWARD: dict[str, ForwardRule] = {}
"""The rules by the names of operations, without ``Backward0``."""


def forward_rule(*names: str) -> Callable[[ForwardRule], ForwardRule]:
    """Register a rule for operations of which several inputs may change."""

    def register(rule: ForwardRule) -> ForwardRule:
        FORWARD.update(dict.fromkeys(names, rule))
        return rule

    return register


def of_one_input(
    *names: str,
) -> Callable[[Callable[[Any, Tensor], Changes]], Callable[[Any, Tensor], Changes]]:
    """Register a rule ``rule(node, change)`` for operations that read one tensor."""

    def register(rule: Callable[[Any, Tensor], Changes]) -> Callable[[Any, Tensor], Changes]:
        def of_node(node: Any, tangents: Tangents) -> Changes:
            (change,) = (t for t in tangents if t is not None)
            return rule(node, change)

        FORWARD.update(dict.fromkeys(names, of_node))
        return rule

    return register


def added(*terms: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None
