"""What a tie means: which of equal losses is in S, and whether the update depends on it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference
import torch
from models import mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.schemes import GlobalScheme

ALPHA = 0.25  # of 12, 3 are worst off
OPTIONS: dict[str, dict[str, Any]] = {
    "IRW": {},
    "centre": {"center": 1.0},
    "class balance": {"class_balance": True},
    "mix": {"mix": 0.3},
    "IRWO": {"outliers": DBSCANFilter(quantile=0.8, min_samples=3)},
    "CVaR": {"weighting": "cvar"},
    "CVaR, class balance": {"weighting": "cvar", "class_balance": True},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return mlp(4, 6, 3).double()


def with_triplets() -> tuple[Tensor, Tensor, list[int]]:
    """Twelve samples, of which three are the same, with the second largest loss; and which."""
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    second = int(losses_of(network(), x, y).argsort(descending=True)[1])
    x, y = torch.cat([x, x[[second, second]]]), torch.cat([y, y[[second, second]]])
    return x, y, [second, 10, 11]


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def step(losses: Any, y: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The record, and the gradient of the step on ``losses(model)``."""
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, **options)
    optimizer.backward(losses(model), labels=y if options.get("class_balance") else None)
    return optimizer.last_step, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whichever_of_duplicates_is_worst_off_the_update_is_the_same(options):
    """Three have two places, given by a rise far above rounding and far below any difference."""
    x, y, same = with_triplets()
    chosen, gradients = set(), []
    for first, second in itertools.combinations(same, 2):
        rise = torch.zeros(12).double().index_fill(0, torch.tensor([first, second]), 1e-9)
        record, gradient = step(
            lambda model, rise=rise: losses_of(model, x, y) + rise, y, **options
        )
        if "outliers" not in options:
            assert record.worst_off[[first, second]].all()
        chosen.add(tuple(record.worst_off.tolist()))
        gradients.append(gradient)
    assert len(chosen) > 1
    for gradient in gradients[1:]:
        assert reference.error(gradient, gradients[0]) < 1e-12


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_order_of_duplicates_in_a_batch_does_not_matter(options):
    """Nor do their losses, which rounding may rank either way."""
    x, y, same = with_triplets()
    _, expected = step(lambda model: losses_of(model, x, y), y, **options)
    others = [i for i in range(12) if i not in same]
    for order in (same + others, others + same, [same[0], *others, *same[1:]]):
        _, gradient = step(lambda model, o=order: losses_of(model, x[o], y[o]), y[order], **options)
        assert reference.error(gradient, expected) < 1e-12


def test_of_different_samples_with_equal_losses_the_lower_index_is_worst_off():
    """And the update is another one where their order is."""
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))

    def tied(model: nn.Module, order: list[int]) -> Tensor:
        """Losses of exactly 1, each with the gradient of its sample."""
        losses = losses_of(model, x[order], y[order])
        return 1.0 + (losses - losses.detach())

    gradients = []
    for order in (list(range(12)), list(reversed(range(12)))):
        record, gradient = step(lambda model, o=order: tied(model, o), y[order])
        assert record.worst_off.nonzero().flatten().tolist() == [0, 1, 2]
        truth = reference.step(tied(twin := network(), order), twin.parameters(), ALPHA)
        expected = torch.cat([g.flatten() for g in truth.gradients])
        assert reference.error(gradient, expected) < 1e-12
        gradients.append(gradient)
    assert reference.error(*gradients) > 1e-2


@pytest.mark.parametrize("weighting", ["irw", "cvar"])
def test_held_weights_of_duplicates(weighting):
    """IRW's are alike; of CVaR's two places, one of three has none."""
    x, y, same = with_triplets()
    model, criterion = network(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(
        sgd, alpha=ALPHA, model=model, criterion=criterion, weighting=weighting
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    weights = GlobalScheme(optimizer, loader).renew().weights[same]
    if weighting == "irw":
        assert reference.error(weights, weights[[0, 0, 0]]) < 1e-12
    else:
        assert sorted(weights.tolist()) == pytest.approx([0, 1 / 3, 1 / 3])
