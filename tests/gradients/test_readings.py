"""Layers that the graph shows: whatever a forward is written with, its step is the loop's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations

from irw_optim import IRWOptimizer, PerSampleLoss
from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.gradients.loss_gradients import LossGradients

B, T, D, ALPHA = 6, 5, 4, 0.3


class Net(nn.Module):
    """A forward as a function of the module, which has parameters of every use."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.written = forward
        self.p, self.q = nn.Parameter(torch.randn(D)), nn.Parameter(torch.rand(D) + 0.5)
        self.square, self.wide = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, 3))
        self.token, self.table = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(9, 1))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.kernel = nn.Parameter(torch.randn(3, D, 2))
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.weighted = parametrizations.weight_norm(nn.Linear(D, D))
        self.slopes = nn.PReLU(T)
        self.last = nn.Linear(D, 2)
        self.register_buffer("offsets", (torch.arange(T)[:, None] - torch.arange(T)) + T - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def standardised(m: Net, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.kernel, (1, 2), keepdim=True)
    h = F.conv1d(x.mT, (m.kernel - mean) * (variance + 1e-5).rsqrt())
    return h.flatten(1)


def with_a_table_of_biases(m: Net, x: Tensor) -> Tensor:
    bias = m.table[m.offsets.flatten()].view(T, T)
    return m.last((x @ x.mT + bias).softmax(-1) @ x)


def class_token(m: Net, x: Tensor) -> Tensor:
    return m.last(m.norm(torch.cat([m.token.expand(len(x), -1, -1), x], 1))[:, 0])


def adapted(m: Net, x: Tensor) -> Tensor:
    return F.linear(x, m.linear.weight + m.up.weight @ m.down.weight, m.linear.bias)


def decomposed(m: Net, x: Tensor) -> Tensor:  # a magnitude and a direction
    weight = m.square + m.up.weight @ m.down.weight
    return F.linear(x, m.q[:, None] * weight / weight.norm(dim=1, keepdim=True))


def by_hand(m: Net, x: Tensor) -> Tensor:  # an RMS norm
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * m.p


def tied(m: Net, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, m.square)), m.square.t(), m.p)


def of_several_pictures(m: Net, x: Tensor, dim: int) -> Tensor:
    h = torch.stack([x, x.flip(1), 2 * x], dim).flatten(0, 1).mT
    mean, variance = torch.linspace(-1, 1, D).to(x), torch.linspace(1, 2, D).to(x)
    h = F.group_norm(h, 2, m.p, m.q) + F.batch_norm(h, mean, variance, m.q, m.token[0, 0])
    h = F.conv1d(h, m.kernel, m.p[:3]).tanh()
    h = F.conv_transpose1d(h, m.kernel).tanh()
    return (
        F.conv1d(h, m.square[:, None], groups=D)
        .unflatten(0, (3, -1) if dim == 0 else (-1, 3))
        .sum(dim)
    )


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a product": lambda m, x: x @ m.wide,
    "a product with the transpose": lambda m, x: x @ m.square.t(),
    "a product with a vector": lambda m, x: x @ m.p,
    "pooled to one number, channels last": lambda m, x: F.adaptive_avg_pool2d(
        F.conv1d(x.mT, m.kernel)[..., None].to(memory_format=torch.channels_last), 1
    ),
    "a linear map": lambda m, x: F.linear(x, m.square, m.p),
    "a linear map of some columns": lambda m, x: F.linear(x[..., :3], m.square[:, :3]),
    "einsum over heads": lambda m, x: torch.einsum("btd,odh->btoh", x, m.kernel),
    "heads": lambda m, x: torch.einsum("bto,odh->btoh", x[..., :3], m.kernel),
    "einsum": lambda m, x: torch.einsum("bti,io->bto", x, m.wide),
    "a sum, a product, a quotient": lambda m, x: (x + m.p) * m.q / (1 + m.scalar.exp()),
    "a quotient by parameters": lambda m, x: x / m.q,
    "a power": lambda m, x: (x.abs() + 1) ** m.q,
    "a maximum": lambda m, x: torch.maximum(x, m.p),
    "an interpolation": lambda m, x: torch.lerp(x, m.p, 0.3),
    "a choice": lambda m, x: torch.where(x > 0, x, m.p),
    "slopes": lambda m, x: m.slopes(x),
    "a gain by hand": by_hand,
    "a norm of one's own": lambda m, x: F.layer_norm(x, (D,), m.p, m.q),
    "a norm with computed gains": lambda m, x: F.layer_norm(x, (D,), m.p.exp(), 2 * m.q),
    "a product with a computed vector": lambda m, x: x @ m.p.exp(),
    "a norm behind the time": lambda m, x: m.norm(x.transpose(0, 1)).transpose(0, 1),
    "a group norm": lambda m, x: F.group_norm(x.mT, 2, m.p, m.q),
    "an instance norm": lambda m, x: F.instance_norm(x.mT, weight=m.p, bias=m.q),
    "a convolution": lambda m, x: F.conv1d(x.mT, m.kernel, m.p[:3]),
    "a transposed convolution": lambda m, x: F.conv_transpose1d(x.mT, m.kernel.transpose(0, 1)),
    "convolutions of several pictures": lambda m, x: of_several_pictures(m, x, 1),
    "convolutions of several pictures, times first": lambda m, x: of_several_pictures(m, x, 0),
    "two views of each sample": lambda m, x: torch.stack(
        m.norm(
            m.linear(
                F.conv1d(torch.cat([x, x.flip(1)]).mT, m.kernel[..., :1], m.p[:3]).repeat(1, 1, 2)[
                    ..., :D
                ]
            )
        ).chunk(2)
    ).prod(0),
    "standardised weights": standardised,
    "weight norm": lambda m, x: m.weighted(x),
    "a low rank beside the weight": adapted,
    "magnitude and direction": decomposed,
    "a class token": class_token,
    "tiles": lambda m, x: torch.cat([m.token.repeat(len(x), 2, 1), x], 1) ** 2,
    "a table of biases": with_a_table_of_biases,
    "a layer of parameters": lambda m, x: x * m.linear(m.token).sigmoid(),
    "tied": tied,
    "folded": lambda m, x: m.norm(m.linear(x.flatten(0, 1))).unflatten(0, x.shape[:2]),
}


def losses_of(model: Net, x: Tensor) -> Tensor:
    output = model(x)
    pattern = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return ((output + pattern) * pattern).square().flatten(1).mean(1)


def check(model: Net, x: Tensor, tolerance: float = 1e-10) -> IRWOptimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    truth = reference.step(losses_of(model, x), trainable, ALPHA)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for _ in range(3):  # the first finds the plan, the others follow it
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, truth, tolerance)
    return optimizer


@pytest.mark.parametrize("name", FORWARDS)
def test_every_way_of_reading_parameters_has_quick_products(name):
    torch.manual_seed(0)
    model = Net(FORWARDS[name]).double()
    optimizer = check(model, torch.randn(B, T, D).double())
    used = {p for p in model.parameters() if p.grad is not None}
    assert used
    assert used <= optimizer.engine.covered_parameters()


@pytest.mark.parametrize("name", FORWARDS)
def test_with_every_other_parameter_frozen(name):
    torch.manual_seed(0)
    for first in (0, 1):
        model = Net(FORWARDS[name]).double()
        for parameter in list(model.parameters())[first::2]:
            parameter.requires_grad_(False)
        x = torch.randn(B, T, D).double()
        if losses_of(model, x).requires_grad:
            check(model, x)


@pytest.mark.parametrize("name", FORWARDS)
def test_the_gram_matrix(name):
    torch.manual_seed(0)
    model, x = Net(FORWARDS[name]).double(), torch.randn(B, T, D).double()
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model)
    captured = LossGradients(optimizer.engine, losses_of(model, x))
    captured.start(torch.ones((), dtype=torch.double), keep_graph=True)
    gram = captured.rows(lambda p: True).gram()
    captured.close()
    losses, leaves = losses_of(model, x), list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in gradients if g is not None])
        for gradients in (
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            for loss in losses
        )
    ]
    G = torch.stack(rows)
    assert reference.error(gram, G @ G.T) < 1e-10


@pytest.mark.parametrize("computed", [lambda p: p.view(1, D), torch.exp, lambda p: p[None] * 3])
def test_hooks_on_what_is_computed_of_parameters(computed):
    """They act on every sample's gradient: on the scores as well as on the step."""

    def forward(m: Net, x: Tensor) -> Tensor:
        gain = computed(m.p)
        gain.register_hook(lambda gradient: 2 * gradient)
        return m.linear(x[:, 0]) * gain

    torch.manual_seed(0)
    check(Net(forward).double(), torch.randn(B, T, D).double())


class Recurrent(nn.Module):
    def __init__(self, read: str, **options: Any) -> None:
        super().__init__()
        self.cell, self.read = nn.LSTM(D, 3, **options), read
        self.last = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        output, (state, cell) = self.cell(x if self.cell.batch_first else x.transpose(0, 1))
        if not self.cell.batch_first:
            output = output.transpose(0, 1)
        if self.read == "states":
            return self.last(output.mean(1))
        if self.read == "last state":
            return self.last(state[-1])
        return self.last(torch.cat([output[:, 0], cell[-1], state[0]], 1))


LSTMS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "time first": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "batch_first": True},
    "without biases": {"bias": False},
}


@pytest.mark.parametrize("read", ["states", "last state", "states, state and cell"])
@pytest.mark.parametrize("kind", LSTMS)
def test_a_fused_lstm(kind, read):
    torch.manual_seed(0)
    model = Recurrent(read, **LSTMS[kind])
    x = torch.randn(B, T, D)
    model(x)
    optimizer = check(model, x, 1e-4)
    assert set(model.parameters()) <= optimizer.engine.covered_parameters()


@pytest.mark.parametrize("frozen", ["bias_ih_l0", "bias_hh_l0", "weight_hh_l0", "weight_ih_l0"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_layer_of_which_a_part_is_frozen(kind, frozen):
    torch.manual_seed(0)
    model = OverRows("states", 0, kind).double()
    for suffix in ("", "_reverse"):
        getattr(model.cell, frozen + suffix).requires_grad_(False)
    check(model, torch.randn(B, 3, T, D).double())


class OverRows(nn.Module):
    """Reads the rows of pictures as sequences, several of a sample at a time."""

    def __init__(self, read: str, first: int, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.cell: Any = kind(D, 3, batch_first=True, bidirectional=True)
        self.read, self.first, self.last = read, first, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, self.first)
        output, last = self.cell(rows.flatten(0, 1))
        state, cell = last if isinstance(self.cell, nn.LSTM) else (last, last)
        read = output.sum(1) if self.read == "states" else torch.cat([state[0], cell[1]], 1)
        return self.last(read.view(*rows.shape[:2], 6).sum(1 - self.first))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("read", ["states", "state and cell"])
def test_a_fused_lstm_over_several_sequences_of_a_sample(read, first):
    torch.manual_seed(0)
    model = OverRows(read, first)
    optimizer = check(model, torch.randn(B, 3, T, D), 1e-4)
    assert set(model.parameters()) <= optimizer.engine.covered_parameters()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_cells_over_several_sequences_of_a_sample(kind, first):
    torch.manual_seed(0)
    model = OverRows("states", first, kind).double()
    optimizer = check(model, torch.randn(B, 3, T, D).double())
    assert set(model.parameters()) <= optimizer.engine.covered_parameters()


def test_a_fused_lstm_behind_batch_statistics():
    torch.manual_seed(0)
    model = Recurrent("states", batch_first=True)
    model.last = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    check(model, torch.randn(B, T, D), 1e-3)


def test_a_plan_is_not_followed_where_the_sizes_are_others():
    model = Net(FORWARDS["a table of biases"]).double()
    for batch in (6, 3, 6, 5, 2):
        check(model, torch.randn(batch, T, D).double())


@pytest.mark.parametrize("name", ["a quotient by parameters", "slopes", "a product"])
def test_a_backward_pass_to_chosen_leaves(name):
    """It asks nodes for other gradients than one to all leaves does."""
    torch.manual_seed(0)
    model, x = Net(FORWARDS[name]).double(), torch.randn(B, T, D).double()
    criterion = PerSampleLoss(lambda output: output.square().flatten(1).mean(1))
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    trainable = list(model.parameters())
    truth = reference.step(model(x).square().flatten(1).mean(1), trainable, ALPHA)
    used = [p for p, g in zip(trainable, truth.gradients, strict=True) if bool(g.any())]
    for inputs in (None, used, None, used):
        optimizer.zero_grad()
        criterion(model(x)).backward(inputs=inputs)
        agree(optimizer, model, truth, 1e-10)


def test_what_was_shared_may_come_to_differ_from_sample_to_sample():
    """The graph is wired alike; only the shape of an elementwise operation tells."""
    torch.manual_seed(0)
    model = Net(lambda m, x: x[:, 0] * (m.p * m.mask).tanh()).double()
    x = torch.randn(B, T, D).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for rows in (1, B, 1, B):
        model.mask = torch.randn(rows, 1).double()
        truth = reference.step(losses_of(model, x), model.parameters(), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, truth, 1e-10)


def test_an_operation_with_other_settings_than_before():
    torch.manual_seed(0)
    model = Net(lambda m, x: torch.addmm(m.p, x[:, 0], m.square, alpha=m.alpha)).double()
    x = torch.randn(B, T, D).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for model.alpha in (1, 2, 1, 3):
        truth = reference.step(losses_of(model, x), model.parameters(), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, truth, 1e-10)


class Apart(torch.autograd.Function):
    """Of each sample alone; its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        opened = x.sigmoid()
        return gradient * opened * (1 + x * (1 - opened))


class Met(torch.autograd.Function):
    """Samples meet in it, which nobody can see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x.mean(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + gradient.mean(0)


@pytest.mark.parametrize(("function", "quick"), [(Apart, True), (Met, False)])
def test_a_function_in_python_is_read_around(
    function: type[torch.autograd.Function], quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutodiffGradients, "_row", lambda *_: pytest.fail("one pass a sample"))

    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](function.apply(self[0](x)))

    model = Model(nn.Linear(D, D), nn.Linear(D, 3)).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA, model=model)
    for _ in range(4):
        x = torch.randn(B, D, dtype=torch.float64)
        truth = reference.step(model(x).square().sum(1), model.parameters(), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(model(x).square().sum(1))
        agree(optimizer, model, truth)
        optimizer.step()
    assert (optimizer.engine.covered_parameters() == set(model.parameters())) == quick


CHANGES = {
    "a frozen weight": lambda m: m[0].weight.requires_grad_(False),
    "a frozen bias": lambda m: m[2].bias.requires_grad_(False),
    "no bias": lambda m: setattr(m[2], "bias", None),
    "tied weights": lambda m: setattr(m[2], "weight", m[0].weight),
    "another precision": lambda m: m.float(),
    "another operation": lambda m: setattr(m, "1", nn.Tanh()),
    "batch statistics": lambda m: setattr(m, "1", nn.BatchNorm1d(D, affine=False).double()),
    "another scale": lambda m: setattr(m[2], "forward", lambda x: scaled(m[2], x)),
}


def scaled(linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.addmm(linear.bias, x, linear.weight.t(), beta=0.5)


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_in_which_nothing_is_due_notices_what_has_changed(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for step in range(8):
        if step == 5:  # checks are due at uses 1, 2, 4 and 8
            CHANGES[change](model)
        x = torch.randn(B, D).to(model[0].weight.dtype)
        trainable = [p for p in model.parameters() if p.requires_grad]
        truth = reference.step(losses_of(model, x), trainable, ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, truth, 1e-10 if x.dtype == torch.float64 else 1e-4)
        optimizer.step()
