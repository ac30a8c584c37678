"""Samples whose target is ignored have no class, and no share of a mean."""

import pytest
import torch
from torch import nn

from irw_optim import IRWOptimizer


def weights_for(target, **options):
    model, criterion = nn.Linear(4, 2), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=model, criterion=criterion, **options)
    criterion(model(torch.randn(6, 4)), target).backward()
    return optimizer.last_step.weights, model.weight.grad


@pytest.mark.parametrize(
    "options",
    [{"weighting": "uniform", "class_balance": True}, {"weighting": "uniform"}, {"mix": 1.0}],
)
def test_they_share_no_weight(options):
    weights, _ = weights_for(torch.tensor([0, 0, 1, 1, -100, -100]), **options)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]))


def test_classes_share_the_weight_without_them():
    weights, _ = weights_for(torch.tensor([0, 0, 0, 1, -100, -100]), class_balance=True)
    torch.testing.assert_close(weights[:3].sum(), torch.tensor(0.5))
    torch.testing.assert_close(weights[3], torch.tensor(0.5))


def test_a_warm_up_on_nobody_has_no_gradient():
    _, gradient = weights_for(torch.full((6,), -100), warmup_steps=1)
    assert not gradient.any()


def test_who_is_ignored_in_part_is_there():
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 2), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(
        sgd, alpha=0.3, model=model, criterion=criterion, weighting="uniform", mix=1.0
    )
    targets = torch.tensor([[0, 1, 0], [1, -100, -100], [0, 1, -100], [-100, -100, -100]])
    criterion(model(torch.randn(4, 3, 4)).mT, targets).backward()
    weights = optimizer.last_step.weights
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
