"""What is used of torch that it does not promise, and what is done where it is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


def gradients_at(
    losses: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor, *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` at some edges, for arguments that are known to be right.

    Its checks take as long as the pass itself through a small model.
    """
    if _run_backward is None or not edges:
        return torch.autograd.grad(
            losses, edges, cotangent, retain_graph=retain_graph, allow_unused=True
        )
    return _run_backward(  # type: ignore[no-any-return]
        (losses,), (cotangent,), retain_graph, False, tuple(edges), True, accumulate_grad=False
    )


def keep_for_further_passes() -> None:
    """Let compiled code keep what its backward pass reads, as autograd does with a retained graph.

    By default torch lets a compiled backward pass write over it. Code that was compiled so is
    dropped, and not taken from a cache either, whose keys don't tell the two apart.
    """
    import torch._functorch.config as config

    if not getattr(config, "donated_buffer", False):
        return
    config.donated_buffer = False
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    keys: Any = getattr(torch.compiler, "config", None)
    if hasattr(keys, "cache_key_tag"):
        keys.cache_key_tag += "nothing donated"
