"""Autograd's nodes as functions: what they are called, what they read, and what they make of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

_BASE_NAMES: dict[type[Node], str] = {}

_SUFFIX = re.compile(r"Backward\d*$")
"""``TanhBackwardBackward0`` is the gradient of a gradient, and no ``Tanh``."""


def base_name(node: Node) -> str:
    """The operation, without what numbers its variants: ``Mean`` for ``MeanBackward1``.

    Functions written in Python may have any name, and have none here.
    """
    name = _BASE_NAMES.get(type(node))
    if name is None:
        python = isinstance(node, BackwardCFunction)
        name = "" if python else _SUFFIX.sub("", node.name())
        _BASE_NAMES[type(node)] = name
    return name


def shape_of(node: Any, output: int = 0) -> torch.Size:
    """The shape of what a node computed."""
    return torch.Size(node._input_metadata[output].shape)


def read_by(node: Any, number: int) -> Any:
    """Shape, dtype and device of what a node read; None for what needs no gradient."""
    parent, output = node.next_functions[number]
    return None if parent is None else parent._input_metadata[output]


def signed(number: int) -> int:
    """A number that a node remembers: negative ones are kept as unsigned."""
    return number - 2**64 if number >= 2**63 else number


def saved(node: Any, name: str) -> Any:
    """What a node remembers under a name, its numbers `signed`; tuples as lists."""
    value = getattr(node, f"_saved_{name}")
    if isinstance(value, tuple | list):
        return [n - 2**64 if isinstance(n, int) and n >= 2**63 else n for n in value]
    return signed(value) if isinstance(value, int) else value


def pull(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What a node makes of the gradients of its outputs, one for each of its inputs."""
    if isinstance(node, BackwardCFunction):
        results = node.apply(*_materialized(node, gradients))
        results = results if isinstance(results, tuple) else (results,)
        return _of_tensors(node, results)
    results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _materialized(node: Any, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Functions written in Python expect zeros where nothing arrived."""
    return [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
        for g, m in zip(gradients, node._input_metadata, strict=True)
    ]


def _of_tensors(node: Any, results: Sequence[Any]) -> Sequence[Tensor | None]:
    """A function in Python answers for every argument, its node knows of the tensors alone."""
    edges = node.next_functions
    if len(results) == len(edges):
        return results
    needed = iter([r for r, need in zip(results, node.needs_input_grad, strict=False) if need])
    return [None if parent is None else next(needed) for parent, _ in edges]
