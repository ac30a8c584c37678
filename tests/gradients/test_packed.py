"""Recurrent layers over packed sequences: a call is one operation, and nobody notices."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from irw_optim import IRWOptimizer
from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.gradients.graph import walk
from irw_optim.gradients.packed import ONE_LAYER, push_layer
from irw_optim.gradients.places import Places
from irw_optim.torch_internals import is_plain_autograd

SIZE, LENGTH, WIDTH = 6, 5, 4


class Reader(nn.Module):
    """Reads tokens by a recurrent layer, and answers from what is asked of it."""

    def __init__(self, kind: type[nn.RNNBase], asks: str, **options: Any) -> None:
        super().__init__()
        self.asks = asks
        self.tokens = nn.Embedding(12, 3)
        self.layer: Any = kind(3, WIDTH, batch_first=True, **options)
        width = (options.get("proj_size") or WIDTH) * (1 + self.layer.bidirectional)
        self.head = nn.Linear(width, 3)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH) / 4) if "first" in asks else None

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.tokens(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        states = None
        if self.first is not None:
            directions = self.layer.num_layers * (1 + self.layer.bidirectional)
            states = self.first.expand(directions, len(tokens), WIDTH).contiguous()
            states = (states, states / 2) if isinstance(self.layer, nn.LSTM) else states
        output, last = self.layer(packed, states)
        if "twice" in self.asks:
            packed = packed._replace(data=output.data[:, :3])
            output, last = self.layer(packed, last)
        if "state" in self.asks:
            last = torch.cat(last, 0) if isinstance(last, tuple) else last
            return self.head(last.mean(0).repeat(1, 1 + self.layer.bidirectional))
        if "writes" in self.asks:
            output.data.mul_(0.5)
        return self.head(pad_packed_sequence(output, batch_first=True)[0].sum(1))


class Computed(Reader):
    """With weights that are made anew in each forward, as some reparametrizations have it."""

    def forward(self, *inputs: Tensor) -> Tensor:
        layer = self.layer
        layer._flat_weights = [1.5 * getattr(layer, name) for name in layer._flat_weights_names]
        try:
            return super().forward(*inputs)
        finally:
            layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


class Recomputed(Reader):
    def forward(self, *inputs: Tensor) -> Tensor:
        return checkpoint(super().forward, *inputs, use_reentrant=False)  # type: ignore[no-any-return]


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(step)
    lengths = torch.randint(1, LENGTH + 1, (SIZE,))
    lengths[step % SIZE] = LENGTH
    return torch.randint(12, (SIZE, LENGTH)), lengths, torch.randint(3, (SIZE,))


def assert_exact(model: nn.Module, steps: int = 3, *, as_one: bool = True) -> None:
    criterion = nn.CrossEntropyLoss()
    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.SGD(parameters, lr=0.1)
    twin = copy.deepcopy(model)
    optimizer = IRWOptimizer(inner, alpha=0.4, model=model, criterion=criterion)
    for step in range(steps):
        tokens, lengths, target = batch(step)
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(9)
        losses = cross_entropy(twin(tokens, lengths), target, reduction="none")
        oracle = reference.step(losses, [p for p in twin.parameters() if p.requires_grad], 0.4)
        optimizer.zero_grad()
        torch.manual_seed(9)
        loss = criterion(output := model(tokens, lengths), target)
        ends = [node for node in walk(output.sum()).order if type(node) is ONE_LAYER]
        # The first graph shows that samples meet; torch 2.6 does not tell who else follows.
        assert bool(ends) == (as_one and step > 0 and is_plain_autograd())
        model.eval()  # what a forward was, it stays
        loss.backward()
        model.train()
        for p, gradient in zip(parameters, oracle.gradients, strict=True):
            assert reference.error(p.grad, gradient) < 1e-9
        optimizer.step()


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("asks", ["outputs", "state", "first, outputs", "first, state", "writes"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "dropout": 0.4}, {"bias": False}],
    ids=str,
)
def test_equals_the_loop(kind: type[nn.RNNBase], asks: str, options: dict[str, Any]) -> None:
    assert_exact(Reader(kind, asks, **options))


def test_projections_and_a_layer_that_runs_twice() -> None:
    assert_exact(Reader(nn.LSTM, "outputs", proj_size=2), as_one=False)
    assert_exact(Reader(nn.GRU, "twice"))


def test_rectified_states() -> None:
    assert_exact(Reader(nn.RNN, "first, outputs", nonlinearity="relu", bidirectional=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("asked", range(5), ids=["all", "inputs", "state", "cell", "weight"])
def test_a_push_is_the_adjoint_of_the_pull(kind: type[nn.RNNBase], asked: int) -> None:
    reader = Reader(kind, "outputs", bidirectional=True)
    optimizer = IRWOptimizer(torch.optim.SGD(reader.parameters(), lr=0.1), alpha=0.4, model=reader)
    tokens, lengths, _ = batch(0)
    optimizer.backward(reader(tokens, lengths).square().sum(1))
    data = torch.randn(SIZE, LENGTH, 3, requires_grad=True)
    packed = pack_padded_sequence(data, lengths.sort(descending=True)[0], True)
    states = [torch.randn(2, SIZE, WIDTH, requires_grad=True) for _ in range(2)]
    output, last = reader.layer(packed, tuple(states) if kind is nn.LSTM else states[0])
    node: Any = output.data.grad_fn
    if not is_plain_autograd():
        return
    assert not Places([node], []).in_python  # what is known of it need not be watched
    left = [output.data, *(last if kind is nn.LSTM else [last])]
    read = [packed.data, *states[: len(left) - 1], *reader.layer._flat_weights]
    moved = {0: range(len(read)), 3: [2], 4: [len(left)]}.get(asked, [asked - 1])
    changes = [torch.randn_like(t) if n in moved else None for n, t in enumerate(read)]
    with torch.no_grad():
        pushed = push_layer(node, changes)
    pulls = [torch.randn_like(t) for t in left]
    gradients = torch.autograd.grad(left, read, pulls)
    forward = sum((a * b).sum() for a, b in zip(pushed, pulls, strict=True))
    back = sum((g * c).sum() for g, c in zip(gradients, changes, strict=True) if c is not None)
    torch.testing.assert_close(forward, back)


def test_what_torch_refuses_is_refused() -> None:
    reader, (tokens, lengths, _) = Reader(nn.GRU, "outputs"), batch(0)
    packed = pack_padded_sequence(torch.randn(SIZE, LENGTH, 2), lengths, True, False)
    states = torch.randn(1, SIZE + 1, WIDTH)
    with pytest.raises(RuntimeError) as wide:
        reader.layer(packed)
    with pytest.raises(RuntimeError) as many:
        reader.layer(packed._replace(data=packed.data[:, :1].expand(-1, 3)), states[:, 1:].mT)
    optimizer = IRWOptimizer(torch.optim.SGD(reader.parameters(), lr=0.1), alpha=0.4, model=reader)
    optimizer.backward(reader(tokens, lengths).square().sum(1))
    with pytest.raises(RuntimeError, match=re.escape(str(wide.value))):
        reader.layer(packed)
    with pytest.raises(RuntimeError, match=re.escape(str(many.value))):
        reader.layer(packed._replace(data=packed.data[:, :1].expand(-1, 3)), states[:, 1:].mT)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_gradient_can_be_differentiated(kind: type[nn.RNNBase]) -> None:
    model = Reader(kind, "first, outputs", bidirectional=True)
    given = batch(0)[:2]
    parameters = [*model.parameters()]

    def second_derivative() -> list[Tensor]:
        gradient = torch.autograd.grad(model(*given).square().sum(), parameters, create_graph=True)
        norm = torch.stack([g.square().sum() for g in gradient]).sum()
        return list(torch.autograd.grad(norm, parameters))

    expected = second_derivative()
    optimizer = IRWOptimizer(torch.optim.SGD(parameters, lr=0.1), alpha=0.4, model=model)
    optimizer.backward(model(*given).square().sum(1))
    kinds = map(type, walk(model(*given).sum()).order)
    assert (ONE_LAYER in kinds) == is_plain_autograd()
    for found, right in zip(second_derivative(), expected, strict=True):
        assert reference.error(found, right) < 1e-12


def test_half_precision_is_summed_up_in_float32() -> None:
    model = Reader(nn.GRU, "outputs").bfloat16()
    layer = copy.deepcopy(model).float().layer
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.4, model=model)
    tokens, lengths, _ = batch(0)
    optimizer.backward(model(tokens, lengths).float().square().sum(1))
    optimizer.zero_grad()
    data = torch.randn(SIZE * LENGTH, 3, dtype=torch.bfloat16)
    packed = pack_padded_sequence(data.view(SIZE, LENGTH, 3), lengths, True, False)
    output, _ = model.layer(packed)
    assert (type(output.data.grad_fn) is ONE_LAYER) == is_plain_autograd()
    output.data.float().sum().backward()
    layer(packed._replace(data=packed.data.float()))[0].data.sum().backward()
    for name, weight in layer.named_parameters():
        assert reference.error(getattr(model.layer, name).grad.float(), weight.grad) < 0.02


def test_frozen_parameters() -> None:
    model = Reader(nn.LSTM, "outputs")
    model.tokens.requires_grad_(False)
    model.layer.bias_hh_l0.requires_grad_(False)
    assert_exact(model)
    model.layer.requires_grad_(False)
    assert_exact(model, as_one=False)


def test_step_by_step_where_somebody_else_follows() -> None:
    normed = Reader(nn.GRU, "outputs")
    weight_norm(normed.layer, "weight_hh_l0")
    assert_exact(normed, as_one=False)
    assert_exact(Computed(nn.GRU, "outputs"), as_one=False)
    assert_exact(Recomputed(nn.LSTM, "outputs"), as_one=False)


def test_no_step_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutodiffGradients, "_row", lambda *_: pytest.fail("one pass a sample"))
    assert_exact(Reader(nn.LSTM, "outputs", bidirectional=True))
    assert_exact(Reader(nn.GRU, "outputs", num_layers=2, dropout=0.5))


def test_hooks_hear_one_pass() -> None:
    heard: list[str] = []

    class Heard(Reader):
        def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            embedded = self.tokens(tokens)
            embedded.register_hook(lambda _: heard.append("embedded"))
            packed = pack_padded_sequence(embedded, lengths, True, False)
            packed.data.register_hook(lambda _: heard.append("packed"))
            output, last = self.layer(packed)
            output.data.register_hook(lambda _: heard.append("output"))
            last.register_hook(lambda _: heard.append("last"))
            return self.head(pad_packed_sequence(output, True)[0].sum(1) + last[0])

    model, criterion = Heard(nn.GRU, ""), nn.CrossEntropyLoss()
    model.layer.weight_hh_l0.register_hook(lambda _: heard.append("weight"))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=0.4, model=model, criterion=criterion)
    for step in range(4):
        heard.clear()
        optimizer.zero_grad()
        tokens, lengths, target = batch(step)
        criterion(model(tokens, lengths), target).backward()
        assert optimizer.last_step is not None
        assert sorted(heard) == ["embedded", "last", "output", "packed", "weight"]


def test_outputs_and_copies_are_those_of_the_layer() -> None:
    model = Reader(nn.LSTM, "outputs", num_layers=2)
    tokens, lengths, _ = batch(0)
    before = model(tokens, lengths)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.4, model=model)
    assert "forward" not in vars(model.layer)
    optimizer.backward(model(tokens, lengths).square().sum(1))
    assert "forward" in vars(model.layer)
    assert torch.equal(model(tokens, lengths), before)
    with torch.no_grad():
        assert torch.equal(model(tokens, lengths), before)
    assert "forward" not in vars(copy.deepcopy(model).layer)
    optimizer.detach()
    assert "forward" not in vars(model.layer)
