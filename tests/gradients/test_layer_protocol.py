"""What a layer call promises: asking changes nothing, and a missing parameter counts as 0."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import reference
import torch
from agreement import agree
from test_layers import CASES, Case, Uses, losses_of
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim import IRWOptimizer
from irw_optim.gradients import rules
from irw_optim.gradients.layers import LayerCall, Layout, LinearCall
from irw_optim.gradients.rules import layer_rule

B = 5


class Turned(nn.Module):
    """Its output has the batch second, its matrix is stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix).t() + self.shift


class TurnedCall(LayerCall):
    def apply(self, input, values):
        return (input @ values["matrix"]).t() + values["shift"]


class TurnedBackCall(TurnedCall):
    """Says where the batch of its output is."""

    def layouts(self, batch_size, output_shape):
        return (Layout(1),) if output_shape == (3, batch_size) else ()

    def settle(self, layout, batch_size):
        super().settle(None, batch_size)
        self.layout = layout

    def apply(self, input, values):
        return super().apply(input, values).t()


@pytest.fixture(params=[TurnedCall, TurnedBackCall], ids=["refused", "found"])
def kind(request, monkeypatch):
    monkeypatch.setattr(rules, "_BY_TYPE", dict(rules._BY_TYPE))
    rules._rule_of_type.cache_clear()
    layer_rule(Turned)(lambda module, x: request.param(x, matrix=module.matrix, shift=module.shift))
    return request.param


@pytest.mark.parametrize("batch", [3, 7], ids=["as many as features", "other"])
@pytest.mark.parametrize("terms", [1, 2])
def test_an_output_with_the_batch_elsewhere(kind, batch, terms):
    model = Turned().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model, criterion=criterion
    )
    x, y = torch.randn(batch, 4).double(), torch.randint(3, (batch,))
    for _ in range(3):
        output = model(x).t()
        losses = sum(F.cross_entropy(n * output, y, reduction="none") for n in range(1, terms + 1))
        truths = [
            reference.step(
                F.cross_entropy(n * model(x).t(), y, reduction="none"), model.parameters(), 0.3
            ).gradients
            for n in range(1, terms + 1)
        ]
        optimizer.zero_grad()
        sum(criterion(n * output, y) for n in range(1, terms + 1)).backward()
        for p, *gradients in zip(model.parameters(), *truths, strict=True):
            assert reference.error(p.grad, sum(gradients)) < 1e-9
    assert losses.shape == (batch,)


@pytest.mark.parametrize("sizes", [(8, 3), (3, 8), (8, 8)], ids=str)
def test_asking_again_gets_the_same_answer(kind, sizes):
    call = kind(torch.randn(sizes[0], 4), matrix=Turned().matrix)
    shape = torch.Size(sizes[::-1])
    answers = [[call.layouts(n, shape) for n in (8, 3, 5)] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (3, 2, 4), (12, 4)], ids=str)
def test_two_batch_sizes_on_one_call(shape):
    """Two losses may share a graph, one for each sequence and one for each token."""
    weight = nn.Parameter(torch.randn(2, 4))
    asked, fresh = LinearCall(torch.randn(shape), weight), []
    for size in (6, 3, 2, 7, 6):
        call = LinearCall(asked.recorded, weight)
        found = asked.layouts(size, torch.Size([*shape[:-1], 2]))
        assert found == call.layouts(size, torch.Size([*shape[:-1], 2]))
        for one in (asked, call):
            one.settle(found[0] if found else None, size)
        assert torch.equal(asked.input, call.input)
        fresh.append(found)
    assert fresh[0] == fresh[-1]


def subsets(names: list[str]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, n) for n in range(len(names) + 1)))


@pytest.mark.parametrize("engine", ["ghost", "autodiff"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_directions_over_some_of_the_parameters(case: Case, engine: str) -> None:
    model = Uses(case).double()
    parameters = dict(model.named_parameters())
    G = reference.per_sample_gradients(losses_of(model), parameters.values())
    blocks = dict(
        zip(parameters, G.split([p.numel() for p in parameters.values()], 1), strict=True)
    )
    v = {name: torch.randn_like(p) for name, p in parameters.items()}
    seen: list[dict[tuple[str, ...], Tensor]] = []

    def probe(losses, gradients, worst_off):
        seen.append(
            {
                names: gradients.dot({parameters[n]: v[n] for n in names})
                for names in subsets(list(parameters))
            }
        )
        return torch.ones_like(losses)

    sgd = torch.optim.SGD(parameters.values(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.5, model=model, engine=engine, weighting=probe)
    optimizer.backward(losses_of(model))
    assert len(seen[0]) == 2 ** len(parameters)
    for names, product in seen[0].items():
        expected = sum((blocks[n] @ v[n].flatten() for n in names), start=torch.zeros(B).double())
        assert product.shape == (B,)
        assert reference.error(product, expected, floor=1e-3) < 1e-8, names


@pytest.mark.parametrize("frozen", ["matrix", "shift", ""])
@pytest.mark.parametrize("chosen", [None, ["matrix"], ["shift"]], ids=str)
def test_apply_is_handed_a_value_for_every_role(monkeypatch, frozen, chosen):
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix + self.shift

    class ShiftedCall(LayerCall):
        def apply(self, input, values):
            return input @ values["matrix"] + values["shift"]

    if chosen and frozen in chosen:
        pytest.skip("nothing to score")
    monkeypatch.setattr(rules, "_BY_TYPE", dict(rules._BY_TYPE))
    rules._rule_of_type.cache_clear()
    layer_rule(Shifted)(lambda m, x: ShiftedCall(x, matrix=m.matrix, shift=m.shift))
    model = nn.Sequential(Shifted()).double()
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    trainable = [p for p in model.parameters() if p.requires_grad]
    names = None if chosen is None else [f"0.{name}" for name in chosen]
    scored = None if names is None else [model.get_parameter(name) for name in names]
    optimizer = IRWOptimizer(
        torch.optim.SGD(trainable, lr=0.1),
        alpha=0.4,
        model=model,
        engine="ghost",
        score_parameters=names,
    )
    x = torch.randn(6, 4).double()
    truth = reference.step(model(x).square().sum(1), trainable, 0.4, scored=scored)
    optimizer.backward(model(x).square().sum(1))
    agree(optimizer, model, truth)
