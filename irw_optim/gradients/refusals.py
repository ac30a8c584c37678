"""Graphs through which no gradient of single samples can be had, told before anything happens."""

from __future__ import annotations

from collections.abc import Iterable

from torch.autograd.graph import Node


def refuse_reentrant_checkpoints(nodes: Iterable[Node]) -> None:
    """Raise where a part of the graph is recomputed by a backward pass of its own.

    Such a pass writes straight into ``p.grad``, and torch lets nobody ask for gradients through it.

    Raises:
        RuntimeError: activation checkpointing with ``use_reentrant=True``.
    """
    if "CheckpointFunctionBackward" in {kind.__name__ for kind in set(map(type, nodes))}:
        raise RuntimeError(
            "torch.utils.checkpoint with use_reentrant=True: it adds to p.grad from inside the "
            "backward pass, so that no gradient of single samples can be had. Call "
            "checkpoint(..., use_reentrant=False), with Hugging Face "
            'gradient_checkpointing_kwargs={"use_reentrant": False}: the same gradients for the '
            "same memory"
        )
