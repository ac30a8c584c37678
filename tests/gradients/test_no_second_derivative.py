"""Functions that torch cannot differentiate twice, and backward passes that cannot be repeated."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from irw_optim import IRWOptimizer, PerSampleLoss
from irw_optim.gradients import pushforward
from irw_optim.monitor.recording import gradient_norm

B = 6


def clipped(g: Tensor, w: Tensor) -> Tensor:
    return g * (w.abs() <= 0.5)


def without_a_graph(g: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        return clipped(g, w)


def in_place(g: Tensor, w: Tensor) -> Tensor:
    return g.mul_(2.0 * (w.abs() <= 0.5))


def by_numpy(g: Tensor, w: Tensor) -> Tensor:
    return torch.from_numpy(g.detach().cpu().numpy() * (w.detach().cpu().numpy() < 0.5)).to(g)


def once(g: Tensor, w: Tensor) -> Tensor:
    return torch.autograd.function.once_differentiable(lambda ctx, g, w: clipped(g, w))(None, g, w)


class Sign(torch.autograd.Function):
    """Its gradient passes as if it were none, ``back`` its own way."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(w)
        ctx.back = back
        return w.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.back(g, *ctx.saved_tensors), None


LAYERS = {
    "linear": lambda m, x: F.linear(x, Sign.apply(m.weight, m.back), m.bias),
    "convolution": lambda m, x: F.conv1d(
        x.unsqueeze(1), Sign.apply(m.weight[:, None, :3], m.back), m.bias, padding=1
    ).mean(2),
    "factor": lambda m, x: F.linear(x, m.weight) * Sign.apply(m.bias, m.back),
}


class Quantised(nn.Module):
    def __init__(self, layer: str, back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.back = layer, back
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(LAYERS[self.layer](self, x).tanh())


@pytest.mark.parametrize("back", ["clipped", "without_a_graph", "in_place", "by_numpy", "once"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_by_what_has_no_double_backward(layer, back, caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    pushforward._tell_once.cache_clear()
    torch.manual_seed(0)
    model = Quantised(layer, globals()[back]).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=0.3, model=model)
    for size in (B, B, 4, B):
        x, y = torch.randn(size, 4).double(), torch.randint(3, (size,))
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, list(model.parameters()), 0.3)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        agree(optimizer, model, truth)
        optimizer.step()
    assert caplog.text.count("passed back once for each sample") == (back != "clipped")


class ScalesWhatItSaved(torch.autograd.Function):
    """Cross entropy, whose gradient is made in the forward pass: of some kernels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.gradients = logits.softmax(1) - F.one_hot(y, logits.shape[1])
        return F.cross_entropy(logits, y, reduction="none")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.gradients.mul_(g.unsqueeze(1)), None


class FreesWhatItSaved(ScalesWhatItSaved):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        gradients = ctx.gradients * g.unsqueeze(1)
        del ctx.gradients
        return gradients, None


class PopsWhatItSaved(ScalesWhatItSaved):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return vars(ctx).pop("gradients") * g.unsqueeze(1), None


SPENDING = {"scales": ScalesWhatItSaved, "frees": FreesWhatItSaved, "pops": PopsWhatItSaved}


class HookedOnce(nn.Module):
    """Its hook removes itself, as implicit layers have it."""

    def forward(self, h: Tensor) -> Tensor:
        def hook(g: Tensor) -> Tensor:
            handle.remove()
            return 2 * g + 1

        h = h.tanh()
        handle = h.register_hook(hook)
        return h


class Selective(nn.Module):
    """What its checkpoint has kept is used up by one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, h: Tensor) -> Tensor:
        keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
        return checkpoint(self.layers, h, use_reentrant=False, context_fn=keep)


@pytest.mark.parametrize("kind", ["scales", "frees", "pops", "hook", "selective"])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(8)], ids=["apart", "meet"])
def test_a_backward_pass_that_cannot_be_repeated_is_refused(kind, norm):
    own = SPENDING.get(kind)
    between = nn.Tanh() if own else Selective() if kind == "selective" else HookedOnce()
    model = nn.Sequential(nn.Linear(4, 8), norm(), between, nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss() if own is None else PerSampleLoss(own.apply)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=model, criterion=criterion)
    optimizer.zero_grad()
    loss = criterion(model(torch.randn(B, 4)), torch.randint(3, (B,)))
    with pytest.raises(RuntimeError, match="two backward passes through one graph differ"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.last_step is None


def take_steps(model: nn.Module) -> None:
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model)
    for _ in range(3):
        y = torch.randint(3, (B,))
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(torch.randn(B, 4)), y, reduction="none"))
        optimizer.step()


class DrawsInBackward(torch.autograd.Function):
    """As in a shake-shake network."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.rand(len(g), 1, dtype=g.dtype, device=g.device)


def test_chance_in_a_backward_pass_is_no_hook(caplog):
    class Shakes(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return DrawsInBackward.apply(h)

    caplog.set_level(logging.INFO, "irw_optim")
    model = nn.Sequential(nn.Linear(4, 8), Shakes(), nn.Linear(8, 3))
    take_steps(model)
    assert "hook" not in caplog.text


NOT_LINEAR = {"norm": lambda g: g / g.norm(), "none": lambda g: g * 2}


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return h.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return NOT_LINEAR[ctx.kind](g), None


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_a_backward_that_is_not_linear_is_told_once(kind, caplog):
    class Bends(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return Bent.apply(h - h.mean(0), kind)  # so that scores go row by row

    model = nn.Sequential(nn.Linear(4, 8), Bends(), nn.Linear(8, 3))
    take_steps(model)
    assert caplog.text.count("is not linear") == (kind != "none")


def lengthwise(model: nn.Module, x: Tensor, layout: torch.layout) -> Tensor:
    """Sums over sequences of several lengths, nested in between."""
    sequences = [row[: 1 + n % 4] for n, row in enumerate(x)]
    nested = torch.nested.as_nested_tensor(sequences, layout=layout)
    return torch.nested.to_padded_tensor(model.first(nested).relu(), 0.0).sum(1)


def branching(model: nn.Module, x: Tensor) -> Tensor:
    h = model.first(x.mean(1))
    return torch.cond(x.sum() > 0, lambda h: model.second(h).relu(), lambda h: h.sin(), (h,))


def sparse(layout: torch.layout) -> nn.Module:
    """A layer whose weight stores a part of its numbers."""
    layer = nn.Linear(4, 8).double()
    mask = torch.arange(32).view(8, 4) % 3 > 0
    layer.weight = nn.Parameter((layer.weight.detach() * mask).to_sparse(layout=layout))
    layer.forward = lambda x: torch.sparse.mm(layer.weight, x.mean(1).t()).t() + layer.bias
    return layer


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # a beta, torch says
@pytest.mark.cpu("sparse weights have kernels of their own on a device")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["coo", "csr"])
def test_sparse_weights(layout, passes):
    torch.manual_seed(0)
    model = nn.Sequential(sparse(layout), nn.Tanh(), nn.Linear(8, 3).double())
    criterion, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.1)
    options = {"model": model, "criterion": criterion, "accumulation_steps": passes}
    optimizer = IRWOptimizer(sgd, alpha=0.3, **options)
    for _ in range(3):
        x, y = torch.randn(passes * B, 4, 4).double(), torch.randint(3, (passes * B,))
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, parameters, 0.3)
        optimizer.zero_grad()
        for some, labels in zip(x.split(B), y.split(B), strict=True):
            (criterion(model(some), labels) / passes).backward()
        for p, expected in zip(parameters, truth.gradients, strict=True):
            stored = p.grad.to_dense() != 0
            assert reference.error(p.grad.to_dense() * stored, expected.to_dense() * stored) < 1e-9
        norm = torch.cat([p.grad.to_dense().flatten() for p in parameters]).norm()
        assert float(gradient_norm(optimizer)) == pytest.approx(float(norm))
        optimizer.step()


OPERATIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "nested": lambda m, x: lengthwise(m, x, torch.strided),
    "jagged": lambda m, x: lengthwise(m, x, torch.jagged),
    "cond": branching,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of prototypes
@pytest.mark.cpu("nested tensors and torch.cond have kernels of their own on a device")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_hides_its_sizes_or_layers_goes_row_by_row(operation):
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(OPERATIONS[operation](self, x))

    torch.manual_seed(0)
    model = Hides().double()
    used = [p for n, p in model.named_parameters() if operation == "cond" or "second" not in n]
    optimizer = IRWOptimizer(torch.optim.SGD(used, 0.01), alpha=0.3, model=model)
    for size in (B, B, B, 4):
        x, y = torch.rand(size, 4, 4).double(), torch.randint(3, (size,))
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, used, 0.3)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        for p, expected in zip(used, truth.gradients, strict=True):
            assert reference.error(p.grad, expected) < 1e-9
        optimizer.step()


def test_a_layer_whose_forward_somebody_has_replaced():
    """It is seen by hooks, once scores go row by row."""

    class OneWay(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return Bent.apply(h - h.mean(0), "none")

    torch.manual_seed(0)
    layer = nn.Linear(4, 8)
    layer.forward = lambda x: F.linear(x.mean(1), layer.weight, layer.bias)
    model = nn.Sequential(layer, OneWay(), nn.Linear(8, 3)).double()
    for _ in range(2):  # the second finds the hooks of the first
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = IRWOptimizer(sgd, alpha=0.3, model=model)
        for _ in range(3):
            x, y = torch.randn(B, 5, 4).double(), torch.randint(3, (B,))
            losses = F.cross_entropy(model(x), y, reduction="none")
            truth = reference.step(losses, list(model.parameters()), 0.3)
            optimizer.zero_grad()
            optimizer.backward(losses)
            agree(optimizer, model, truth)
            optimizer.step()
