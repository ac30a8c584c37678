"""What CONTRIBUTING.md shows to add, added: the code of the page, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from agreement import agree
from torch import nn

from irw_optim import IRWOptimizer
from irw_optim.gradients import rules

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
SECTIONS = ("A layer rule", "A weighting", "An outlier filter", "An engine")


def code_of(section: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    match = re.search(rf"^### {section}\n.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert match, section
    return match[1]


def run(section: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code_of(section), names)
    return names


@pytest.fixture(autouse=True)
def _rules_as_they_were(monkeypatch):
    monkeypatch.setattr(rules, "_BY_TYPE", dict(rules._BY_TYPE))
    rules._rule_of_type.cache_clear()


def step(model: nn.Module, **options):
    """One backward pass on six samples, and the loop's."""
    model = model.double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, **{"alpha": 0.4, "model": model, **options})
    x = torch.randn(6, 4).double()
    losses = model(x).square().sum(1)
    truth = reference.step(losses, model.parameters(), 0.4)
    optimizer.backward(model(x).square().sum(1))
    return optimizer, model, truth


@pytest.mark.parametrize("section", SECTIONS)
def test_in_under_thirty_lines(section):
    assert len(code_of(section).splitlines()) < 30


def test_a_layer_rule():
    layer = run("A layer rule")["Mapped"]
    agree(*step(nn.Sequential(layer(4, 5), nn.Linear(5, 3)), engine="ghost"))


class Hidden(torch.autograd.Function):
    """Behind it the graph shows nothing."""

    @staticmethod
    def forward(ctx, h):
        return (h * 2).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return (gradient * 2).T


class Hiding(nn.Module):
    def forward(self, h):
        return Hidden.apply(h.T)  # with the batch where nobody expects it


@pytest.mark.parametrize("known", [True, False])
def test_where_the_graph_does_not_show_it_the_rule_is_asked(known):
    layer = run("A layer rule")["Mapped"]
    if not known:
        del rules._BY_TYPE[layer]
        rules._rule_of_type.cache_clear()
    model = nn.Sequential(layer(4, 5), Hiding(), nn.Linear(5, 3)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.4, model=model)
    for _ in range(3):
        x = torch.randn(6, 4).double()
        truth = reference.step(model(x).square().sum(1), model.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(model(x).square().sum(1))
        agree(optimizer, model, truth)
    covered = set.union(*(c.covered for c in optimizer.engine.coverings.values()))
    assert (model[0].matrix in covered) is known


def test_without_the_rule_the_graph_shows_it():
    layer = run("A layer rule")["Mapped"]
    del rules._BY_TYPE[layer]
    rules._rule_of_type.cache_clear()
    agree(*step(nn.Sequential(layer(4, 5), nn.Linear(5, 3)), engine="ghost"))


def test_a_weighting():
    optimizer, _, truth = step(nn.Linear(4, 3), weighting=run("A weighting")["by_length"])
    lengths = truth.G.norm(dim=1)
    assert reference.error(optimizer.last_step.weights, lengths / lengths.sum()) < 1e-6


def test_an_outlier_filter():
    optimizer, _, truth = step(nn.Linear(4, 3), outliers=run("An outlier filter")["Longest"](0.2))
    longest = int(truth.G.norm(dim=1).argmax())
    assert optimizer.last_step.outliers.nonzero().flatten().tolist() == [longest]
    assert float(optimizer.last_step.weights[longest]) == 0


def test_an_engine():
    names = run("An engine")
    model = nn.Linear(4, 3).double()
    losses = model(torch.randn(6, 4).double()).square().sum(1)
    truth = reference.step(losses, model.parameters(), 0.4)
    weights = names["irw_weights"](losses.detach(), names["Rows"](losses, model.parameters()), 0.4)
    assert reference.error(weights, truth.weights) < 1e-9
    agree(*step(nn.Linear(4, 3), engine=names["Rows"]))


def test_an_engine_gives_every_product_as_the_rows_do():
    names = run("An engine")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    losses = model(torch.randn(6, 4).double()).square().sum(1)
    parameters = list(model.parameters())
    rows, G = names["Rows"](losses, parameters), reference.per_sample_gradients(losses, parameters)
    some = {parameters[0]: torch.randn(3, 4).double()}
    weights = torch.randn(6).double()
    assert reference.error(rows.dot(some), G[:, :12] @ some[parameters[0]].flatten()) < 1e-9
    assert reference.error(rows.gram(), G @ G.T) < 1e-9
    combined = torch.cat([rows.combine(weights)[p].flatten() for p in parameters])
    assert reference.error(combined, weights @ G) < 1e-9


def test_an_engine_that_is_wrong_is_told():
    class Twice(run("An engine")["Rows"]):  # type: ignore[misc]
        def combine(self, weights):
            return {p: 2 * part for p, part in super().combine(weights).items()}

    with pytest.raises(RuntimeError, match=r"Twice.*is not exact for bias, weight"):
        step(nn.Linear(4, 3), engine=Twice)
