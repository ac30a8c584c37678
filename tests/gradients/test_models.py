"""Models that bite: three training steps, each equal to a loop of plain autograd."""

from __future__ import annotations

from fnmatch import fnmatchcase as fnmatch
from typing import Any

import pytest
import reference
import torch
from agreement import agree
from torch import Tensor, nn
from zoo import CASES, Case

from irw_optim import IRWOptimizer

ALPHA, STEPS, TOLERANCE = 0.4, 3, 1e-9

NOT_BY_GHOST_ALONE = (
    "child's weight*",
    "parameters on a module",
    "scalar parameter",
    "functional_call",
    "positions (T, D), square",  # guessed wrong, and noticed
    "folded frames",
    "time first, square",
    "features first",
    "sorted and back",
    "experts",
    "centred by the batch",
    "attention over the batch",
    "in-batch negatives",
    "BatchNorm, train",
    "BatchNorm and dropout",
    "BatchNorm without statistics",
    "convolutions with BatchNorm",
    "RNN*",
    "GRU*",
    "LSTM*",
    "Bilinear",
    "PReLU",
    "EmbeddingBag, max",
    "embedding scaled by frequency",
    "*_norm",
    "orthogonal",
    "no double backward",
    "torch.compile*",
)


def losses_of(case: Case, model: nn.Module, inputs: tuple[Any, ...], seed: int) -> Tensor:
    """Losses (B,), with the dropout masks of ``seed``."""
    torch.manual_seed(seed)
    output = case.call(model, *inputs)
    pattern = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return (
        (output + 2 * pattern)
        .square()
        .flatten(1 if output.ndim > 1 else 0)
        .reshape(len(output), -1)
        .mean(1)
    )


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: double(v) for name, v in value.items()}
    return value.double() if value.is_floating_point() else value


def copy_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: copy_of(v) for name, v in value.items()}
    return value.clone()


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model().double()


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trains_like_the_loop(case: Case, engine: str) -> None:
    trains_like_the_loop(case, engine)


@pytest.mark.parametrize("name", CASES)
def test_ghost_alone_is_exact_or_refuses_by_name(name: str) -> None:
    try:
        trains_like_the_loop(CASES[name], "ghost")
    except RuntimeError as refusal:
        message = str(refusal)
        assert message.startswith('engine="ghost"')
        assert 'engine="auto"' in message
        names = [name for name, _ in made(CASES[name]).named_parameters()]
        assert any(name in message for name in names)
        assert any(fnmatch(name, pattern) for pattern in NOT_BY_GHOST_ALONE)


def trains_like_the_loop(case: Case, engine: str) -> None:
    model, twin = made(case), made(case)
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA, model=model, engine=engine
    )
    twins = [p for p in twin.parameters() if p.requires_grad]
    plain = torch.optim.SGD(twins, lr=0.1)
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        inputs = tuple(double(value) for value in case.inputs())
        truth = reference.step(
            losses_of(case, twin, tuple(map(copy_of, inputs)), step), twins, ALPHA
        )
        optimizer.zero_grad()
        optimizer.backward(losses_of(case, model, inputs, step))
        agree(optimizer, model, truth, TOLERANCE)
        same_buffers(model, twin)
        optimizer.step()
        for parameter, gradient in zip(twins, truth.gradients, strict=True):
            parameter.grad = gradient
        plain.step()
    optimizer.detach()


def same_buffers(model: nn.Module, twin: nn.Module) -> None:
    """Running statistics and power iterations moved on once, as in one forward."""
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert reference.error(ours, theirs) < TOLERANCE, name
