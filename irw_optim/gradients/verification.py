"""No static look at modules proves the ghost products exact; comparing them with autograd does.

A forward may mix samples (``h - h.mean(0)``), use a child's weight behind its back, or fold the
batch dimension. Each shows in G^T r for a random vector r: an exchange between samples cancels for
the vectors of a plane at most, which chance does not meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from irw_optim.gradients.protocol import PerSampleGradients

if TYPE_CHECKING:
    from irw_optim.gradients.backward_passes import BackwardPasses
    from irw_optim.gradients.engine import Engine, OwnEngine

_TOLERANCE = {torch.float64: 1e-6, torch.float16: 5e-2, torch.bfloat16: 1.5e-1}
"""Far above rounding, also of sums in which large terms cancel; far below what mixing does."""

_OF_PRODUCTS = {"highest": 1e-3, "high": 1e-2, "medium": 3e-2}
"""For float32, by the precision in which torch multiplies it: TF32 has the digits of float16."""

_HALF = (torch.float16, torch.bfloat16)

_NOISE = 1e-2
"""Share of the tolerance under which a difference, relative to the whole gradient, is rounding:
a bias in front of a normalisation has no gradient but noise."""


def probe_of(losses: Tensor, random: torch.Generator) -> Tensor:
    """Random weights for the samples, (B,), from a generator of the engine's own."""
    probe = torch.randn(len(losses), generator=random, dtype=torch.float64, device="cpu")
    return probe.to(losses.device, losses.dtype)


def compare(
    parameters: Sequence[Tensor],
    truth: Sequence[Tensor | None],
    probe: Tensor,
    gradients: PerSampleGradients,
) -> dict[Tensor, float]:
    """The relative error of each parameter for which G^T r is not the true gradient; r, (B,)."""
    claim = gradients.combine(probe)
    return wrong_among(differences(parameters, truth, list(map(claim.get, parameters)), gradients))


def in_half_precision(gradients: PerSampleGradients) -> bool:
    """Whether any layer's gradient arrived in half precision."""
    return any(dtype in _HALF for dtype in _dtypes(gradients))


class Difference(NamedTuple):
    """How far one parameter's gradient is off."""

    parameter: Tensor
    error: float  # a norm
    size: float  # the gradient's norm
    tolerance: float


def differences(
    parameters: Sequence[Tensor],
    truth: Sequence[Tensor | None],
    claim: Sequence[Tensor | None],
    gradients: PerSampleGradients | None = None,
) -> list[Difference]:
    """Measure each parameter's gradient against autograd's; a device is waited for once."""
    pairs = zip(parameters, truth, strict=True)
    true = [torch.zeros_like(p) if t is None else t.to_dense() for p, t in pairs]
    off = [_norm(t if c is None else t - c.to_dense()) for t, c in zip(true, claim, strict=True)]
    norms = torch.stack([*off, *map(_norm, true)]).tolist() if true else []
    dtypes = _dtypes(gradients)
    tolerances = [max(map(_tolerance, (t.dtype, *dtypes))) for t in true]
    return list(map(Difference, parameters, norms[: len(true)], norms[len(true) :], tolerances))


def wrong_among(found: Sequence[Difference]) -> dict[Tensor, float]:
    """The relative error of each parameter that disagrees, for one probe."""
    total = sum((d.size**2 for d in found), 0.0) ** 0.5
    wrong: dict[Tensor, float] = {}
    for parameter, error, size, tolerance in found:
        unit = max(size, _NOISE * total)
        if error > tolerance * unit:
            wrong[parameter] = error / unit if unit else math.inf
    return wrong


def equal(
    parameters: Sequence[Tensor], some: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> bool:
    """Whether two passes gave the same gradients, to rounding."""
    if any((a is None) is not (b is None) for a, b in zip(some, others, strict=True)):
        return False
    return not wrong_among(differences(parameters, some, others))


def _norm(tensor: Tensor) -> Tensor:
    """Of numbers whose squares float32 may not hold; 0-dim, in float64 or the device's widest."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    if not tensor.numel():
        return torch.zeros((), dtype=wide, device=tensor.device)
    size = tensor.abs().max()
    unit = torch.where(size == 0, torch.ones_like(size), size)
    norm: Tensor = size.to(wide) * (tensor / unit).abs().float().norm().to(wide)
    return norm


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return _OF_PRODUCTS[_precision_of_products()]
    return _TOLERANCE.get(dtype, 1e-3)


def _precision_of_products() -> str:
    try:
        precision = torch.get_float32_matmul_precision()
        convolutions = torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by torch's newer names, which the older ones do not tell
        return "high"
    return "high" if precision == "highest" and convolutions else precision


def _dtypes(gradients: PerSampleGradients | None) -> set[torch.dtype]:
    return {call.precision for call in getattr(gradients, "calls", ())}


def rows_by(
    engine: Engine,
    own: OwnEngine,
    losses: Tensor,
    parameters: Sequence[Tensor],
    passes: BackwardPasses,
) -> PerSampleGradients:
    """Those of the user's ``own`` engine, compared with autograd at uses 1, 2, 4, 8, ..."""
    with torch.enable_grad():
        rows = own(losses, parameters)
    if engine.uses & (engine.uses - 1) == 0:
        probe = probe_of(losses, engine.random)
        wrong = compare(parameters, passes.without_hooks(parameters, probe), probe, rows)
        if wrong:
            raise RuntimeError(
                f"engine={own!r} is not exact for {engine.names_of(wrong)}: combine(w) differs "
                f"from autograd by {max(wrong.values()):.2g} of the gradient; expected the sum of "
                'w_i times the gradient of loss i, or engine="auto"'
            )
    return rows
