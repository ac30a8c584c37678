"""G v by forward-mode differentiation: the JVP of the losses, without a graph.

::

    G v = d/dt losses(parameters + t v)   at t = 0

It is exact wherever backward is the derivative, which ``torch.no_grad()`` may stop. So the weighted
sum of the scores is compared with <G^T w, v> where G^T w is known, as for S, and the scores of the
first batch with the engine's. Where they differ, or an operation has no derivative in forward mode,
the engine does it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.graph import Graph
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.nodes import shape_of
from irw_optim.gradients.protocol import Direction

logger = logging.getLogger("irw_optim")

SMALL = 2**20
"""Outputs of layers in a batch, up to which what surrounds the arithmetic costs more than it."""

ATTENTION_AT_MOST = 1 / 4
"""As a share of the outputs of layers: numbers in matrices of attention that a fused kernel spares.
Beyond it time and memory would soon be theirs, which grow with the square of the length."""

LAYERS = ("Addmm", "Mm", "Convolution", "Embedding", "Native", "Cudnn", "Mkldnn")
"""How the names of the operations begin that layers take: products, norms, tables, recurrence."""

FAILS = "forward mode fails"
"""What an `Engine` remembers of its model, beside what the engines know."""


def jvp(
    model: nn.Module,
    losses_of: Callable[[Any], PerSampleLosses],
    batch: Any,
    direction: Direction,
) -> Tensor:
    """G v for one batch, (B,), v being 0 where it is not given; RuntimeError if torch cannot."""
    with warnings.catch_warnings(), torch.no_grad(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", "`torch.jit.script`")  # torch's, of its own derivatives
        dual = {p: forward_ad.make_dual(p.detach(), v) for p, v in direction.items()}
        with _in_place_of(dual, model), _differentiable_attention():
            losses = losses_of(batch).losses
        value, tangent = forward_ad.unpack_dual(losses)
    return widened(torch.zeros_like(value) if tangent is None else tangent)


def sizes_of(graph: Graph, samples: int) -> tuple[float, float]:
    """For a sample: numbers in layers' outputs, and in matrices of fused attention."""
    outputs = sum(shape.numel() for shape in _output_shapes(graph, *LAYERS))
    fused = _output_shapes(graph, "ScaledDotProduct")
    attention = sum(shape[:-1].numel() * shape[-2] for shape in fused)
    return outputs / samples, attention / samples


def _output_shapes(graph: Graph, *operations: str) -> list[torch.Size]:
    return [shape_of(node) for node in graph.order if node.name().startswith(operations)]


def pays_off(engine: Engine, sizes: tuple[float, float], batch_size: int) -> bool:
    """Whether to try forward mode for batches of an engine's model, of these `sizes_of` a sample.

    It saves the hooks and the Python for every layer: a gain where batches are small
    (``benchmarks.cost renewal``). Numbers of low precision do not carry derivatives well.
    """
    outputs, attention = sizes
    return (
        not engine.known.get(FAILS)
        and engine.kind == "auto"
        and engine.model is not None
        and batch_size * outputs <= SMALL
        and attention <= ATTENTION_AT_MOST * outputs
        and in_full_precision(engine)
    )


def in_full_precision(engine: Engine) -> bool:
    """Whether an engine's model computes in float32 or better throughout."""
    parameters = [] if engine.model is None else list(engine.model.parameters())
    return all(p.dtype in (torch.float32, torch.float64) for p in parameters) and not any(
        torch.is_autocast_enabled(device) for device in {p.device.type for p in parameters}
    )


def give_up(engine: Engine, reason: RuntimeError) -> None:
    """Leave this model's scores to the engine from now on, and say so."""
    engine.known[FAILS] = True
    logger.info(
        "scores of the data set take a backward pass, forward mode being out: %s",
        str(reason).split("\n")[0],
    )


def check_equal(scores: Tensor, expected: Tensor) -> None:
    """Raise a RuntimeError unless both are the same scores, (B,), to rounding."""
    _check_difference((scores - expected).abs().max(), expected.abs().max())


def check_sum(scores: Tensor, direction: Direction, weights: Tensor, combined: Direction) -> None:
    """Raise a RuntimeError unless w^T (G v) = (G^T w)^T v, for G v, v, w and G^T w."""
    terms = weights * scores
    expected = sum((combined[p] * v).sum() for p, v in direction.items() if p in combined)
    _check_difference((terms.sum() - expected).abs(), terms.abs().sum())


def _check_difference(difference: Tensor, scale: Tensor) -> None:
    if not bool(scale.isfinite()):
        return  # which is for the scheme to say
    tolerance = 1e-8 if scale.dtype == torch.float64 else 1e-3
    if not bool(difference <= tolerance * scale + torch.finfo(scale.dtype).tiny):
        raise RuntimeError(
            f"it differs from backward by {float(difference):.2g} in {float(scale):.2g}"
        )


@contextmanager
def _in_place_of(values: Direction, model: nn.Module) -> Iterator[None]:
    """Give the modules these values in place of their parameters.

    ``torch.func.functional_call`` puts a value back where a module has two names.
    """
    changes: list[tuple[dict[str, Any], str, Any, Any]] = []  # where, which, before and inside
    for module in list(model.modules()):
        table = module._parameters
        for name, p in table.items():
            if p is not None and p in values:
                changes.append((table, name, p, values[p]))
        if isinstance(module, nn.RNNBase):
            flat = module._flat_weights
            inside = [w if w is None else values.get(w, w) for w in flat]
            changes.append((vars(module), "_flat_weights", flat, inside))
    try:
        for where, name, _, value in changes:
            where[name] = value
        yield
    finally:
        for where, name, before, _ in changes:
            where[name] = before


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by operations that have a forward derivative; its fused kernels have none."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
