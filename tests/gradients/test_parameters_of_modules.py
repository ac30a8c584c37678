"""Parameters that a module adds, multiplies with, expands or repeats itself, by any words."""

from __future__ import annotations

from collections.abc import Callable

import products
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irw_optim import IRWOptimizer
from irw_optim.gradients import rules
from irw_optim.gradients.loss_gradients import LossGradients

SIZES = [(5, 3, 4), (1, 3, 4), (1, 1, 4), (5, 1, 4), (5, 5, 4), (4, 3, 4), (4, 4, 4), (1, 1, 1)]
"""B, T and the width."""

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Reads a fixed batch (B, T, d)."""

    def __init__(self, forward: Forward, sizes: tuple[int, int, int], *shape: int) -> None:
        super().__init__()
        self.x = torch.randn(sizes)
        self.p = nn.Parameter(torch.randn(shape))
        self.first = nn.Linear(sizes[-1], sizes[-1])
        self.read = forward

    def forward(self) -> Tensor:
        return self.read(self, self.first(self.x))


def losses_of(model: nn.Module) -> Tensor:
    output = model()
    pattern = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return ((output + pattern) * pattern).square().flatten(1).sum(1)


FORMS: dict[str, tuple[Forward, Callable[[int, int, int], tuple[int, ...]]]] = {
    "scalar": (lambda m, h: h * m.p, lambda B, T, d: ()),
    "one number": (lambda m, h: h + m.p, lambda B, T, d: (1,)),
    "(d,)": (lambda m, h: h * m.p, lambda B, T, d: (d,)),
    "(T, d)": (lambda m, h: h + m.p, lambda B, T, d: (T, d)),
    "(1, T, d)": (lambda m, h: h + m.p, lambda B, T, d: (1, T, d)),
    "(T, 1)": (lambda m, h: h * m.p, lambda B, T, d: (T, 1)),
    "(1, 1, d)": (lambda m, h: h * m.p, lambda B, T, d: (1, 1, d)),
    "(1, T, 1)": (lambda m, h: h + m.p, lambda B, T, d: (1, T, 1)),
    "part": (lambda m, h: h + m.p[:, 1 : 1 + h.shape[1]], lambda B, T, d: (1, T + 2, d)),
    "transposed": (lambda m, h: h + m.p.T, lambda B, T, d: (d, T)),
    "None in front": (lambda m, h: h + m.p[None], lambda B, T, d: (T, d)),
    "unsqueezed": (lambda m, h: h * m.p.unsqueeze(-1), lambda B, T, d: (T,)),
    "expanded over samples": (
        lambda m, h: torch.cat([m.p.expand(len(h), -1, -1), h], 1),
        lambda B, T, d: (1, 1, d),
    ),
    "expanded over features": (
        lambda m, h: torch.cat([m.p[None].expand(len(h), -1, h.shape[2]), h], 1),
        lambda B, T, d: (2, 1),
    ),
    "expanded over tokens": (
        lambda m, h: h + m.p.expand(len(h), h.shape[1], -1),
        lambda B, T, d: (1, 1, d),
    ),
    "expanded, then a part": (
        lambda m, h: h + m.p.expand(len(h), h.shape[1] + 1, -1)[:, 1:],
        lambda B, T, d: (1, 1, d),
    ),
    "expand(size=)": (
        lambda m, h: h + m.p.expand(size=h.shape),
        lambda B, T, d: (1, 1, d),
    ),
    "expand_as": (lambda m, h: h * m.p.expand_as(h), lambda B, T, d: (T, 1)),
    "broadcast_to": (lambda m, h: h * torch.broadcast_to(m.p, h.shape), lambda B, T, d: (d,)),
    "broadcast_to, by keyword": (
        lambda m, h: torch.cat([torch.broadcast_to(input=m.p, size=h.shape), h], 1),
        lambda B, T, d: (d,),
    ),
    "repeated over samples": (
        lambda m, h: torch.cat([m.p.repeat(len(h), 1, 1), h], 1),
        lambda B, T, d: (1, 2, d),
    ),
    "repeated over tokens": (
        lambda m, h: h + m.p.repeat(len(h), h.shape[1], 1),
        lambda B, T, d: (1, 1, d),
    ),
    "tiled": (lambda m, h: h * torch.tile(m.p, (len(h), 1, 1)), lambda B, T, d: (T, d)),
    "time first": (
        lambda m, h: (h.transpose(0, 1) * m.p).transpose(0, 1),
        lambda B, T, d: (T, 1, d),
    ),
    "folded": (lambda m, h: (h.flatten(0, 1) * m.p).view_as(h), lambda B, T, d: (d,)),
    "(B, T) of one number": (lambda m, h: h[..., 0] + m.p, lambda B, T, d: (T,)),
    "alpha for the parameter": (
        lambda m, h: torch.add(h, m.p, alpha=0.5),
        lambda B, T, d: (d,),
    ),
    "alpha for the other": (lambda m, h: torch.add(m.p, h, alpha=2), lambda B, T, d: (T, d)),
    "by keyword": (
        lambda m, h: torch.add(input=h, other=m.p, alpha=3),
        lambda B, T, d: (d,),
    ),
    "method, by keyword": (lambda m, h: h.add(other=m.p, alpha=-1), lambda B, T, d: (d,)),
    "product, by keyword": (lambda m, h: torch.mul(input=m.p, other=h), lambda B, T, d: (d,)),
    "difference": (lambda m, h: h - m.p, lambda B, T, d: (d,)),
    "difference from": (lambda m, h: m.p - h, lambda B, T, d: (T, d)),
    "difference, alpha": (lambda m, h: torch.sub(h, m.p, alpha=2), lambda B, T, d: (d,)),
    "difference by name": (lambda m, h: m.p.sub(h, alpha=2), lambda B, T, d: (T, d)),
    "in place": (lambda m, h: h.clone().add_(m.p, alpha=0.5).sub_(m.p), lambda B, T, d: (d,)),
}


def made(form: str, sizes: tuple[int, int, int], dtype=torch.float64) -> nn.Module:
    forward, shape_for = FORMS[form]
    torch.manual_seed(1)
    model = Net(forward, sizes, *shape_for(*sizes)).to(dtype)
    model.x = model.x.to(dtype)
    return model


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_covered_and_exact(form, sizes):
    """``engine="ghost"`` raises where it does not cover."""
    engine = "auto" if form == "expanded over features" and sizes[0] == 1 else "ghost"
    products.check(made(form, sizes), losses_of, engine, 1e-10, sizes[0])


OTHERS: dict[str, tuple[Forward, Callable[[int, int, int], tuple[int, ...]]]] = {
    "a row for each sample": (
        lambda m, h: h + m.p[: len(h), None],
        lambda B, T, d: (B + 1, d),
    ),
    "numbers alone": (lambda m, h: h * (2.0 * m.p + 1), lambda B, T, d: (d,)),
    "from one": (lambda m, h: h * (1 - m.p), lambda B, T, d: (d,)),
    "twice": (lambda m, h: h + m.p + m.p, lambda B, T, d: (d,)),
    "with itself": (lambda m, h: h + (m.p + m.p), lambda B, T, d: (d,)),
    "scaled by a part of itself": (lambda m, h: h + m.p[0] * m.p, lambda B, T, d: (T, d)),
    "product in place": (lambda m, h: h.clone().mul_(m.p), lambda B, T, d: (d,)),
    "power": (lambda m, h: h * m.p.abs().pow(exponent=0.5), lambda B, T, d: (d,)),
    "quotient": (lambda m, h: m.p / (3 + h.square()), lambda B, T, d: (T, d)),
    "linear, by keyword": (
        lambda m, h: F.linear(input=h, weight=m.p, bias=None),
        lambda B, T, d: (2, d),
    ),
    "linear, transposed": (lambda m, h: F.linear(h, weight=m.p.T), lambda B, T, d: (d, 2)),
    "layer norm, by keyword": (
        lambda m, h: F.layer_norm(h, h.shape[-1:], weight=m.p, eps=1e-2),
        lambda B, T, d: (d,),
    ),
    "repeated beyond size 1": (
        lambda m, h: torch.cat([h, h], 1) + m.p.repeat(2, 1),
        lambda B, T, d: (T, d),
    ),
    "addcmul": (lambda m, h: torch.addcmul(h, h, m.p, value=2), lambda B, T, d: (d,)),
    "matmul": (lambda m, h: torch.matmul(h, other=m.p), lambda B, T, d: (d, 2)),
    "without a batch": (
        lambda m, h: h * (m.p * m.first.weight[:, :1].sum()),
        lambda B, T, d: (T, d),
    ),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", OTHERS)
def test_what_no_rule_takes_is_exact_all_the_same(form, sizes, monkeypatch):
    monkeypatch.setitem(FORMS, form, OTHERS[form])
    products.check(made(form, sizes), losses_of, "auto", 1e-10, sizes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_that_are_promoted(dtype):
    def forward(model: Net, h: Tensor) -> Tensor:
        other = (10 * model.x).to(dtype)
        return h + torch.add(other, model.p, alpha=2) + (other * model.p)

    model = Net(forward, (5, 3, 4), 4).double()
    model.x = model.x.double()
    products.check(model, losses_of, "ghost", 1e-10, 5)


def test_a_rule_that_does_not_know_a_keyword_leaves_the_call_to_autodiff():
    def known(output: Tensor, input: Tensor, other: Tensor) -> None:
        raise AssertionError("called with words that it does not know")

    assert rules.call_of(known, torch.ones(2), (torch.ones(2),), {"alpha": 2}) is None


def test_an_error_inside_a_rule_is_not_swallowed():
    def broken(output: Tensor, input: Tensor) -> None:
        len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="len"):
        rules.call_of(broken, torch.ones(2), (torch.ones(2),), {})


def test_a_parameter_that_only_one_call_of_two_accounts_for():
    """The expanded view is noted where it is expanded, and not again where it is added."""
    model = made("expanded over tokens", (5, 3, 4))
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model)
    captured = LossGradients(optimizer.engine, losses_of(model))
    optimizer.engine.covering(captured)
    parameters = [p for site in captured.graph.sites for p in site.call.parameters.values()]
    assert sum(p is model.p for p in parameters) == 1
