"""The optimizers that IRWOptimizer is tried around, and the training that each goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import reference
import torch
from torch import Tensor, nn, optim

from irw_optim import IRWOptimizer

try:
    import pytorch_optimizer
    import schedulefree
except ImportError:  # `make test-lowest` has none of the stacks
    pytorch_optimizer = schedulefree = None

ALPHA = 0.3
FEATURES, CLASSES = 5, 3

Parameters = Iterable[Tensor]


class Inner(NamedTuple):
    """An optimizer class with arguments that make it move, and what it asks of a loop."""

    name: str
    make: Callable[[Parameters], Any]
    closure: str = ""  # what the closure of a step must do, where one is needed
    matrices_only: bool = False
    sparse: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """Small, in float64, the same at every call."""
        torch.manual_seed(0)
        if self.sparse:
            head = nn.Linear(4, CLASSES).requires_grad_(False)
            return nn.Sequential(nn.EmbeddingBag(7, 4, sparse=True), head).double()
        bias = not self.matrices_only
        return nn.Sequential(
            nn.Linear(FEATURES, 6, bias=bias), nn.Tanh(), nn.Linear(6, CLASSES, bias=bias)
        ).double()

    def batches(self, number: int = 4, size: int = 10) -> list[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(1)
        return [
            (
                torch.randint(7, (size, 3), generator=draw)
                if self.sparse
                else torch.randn(size, FEATURES, generator=draw, dtype=torch.float64),
                torch.randint(CLASSES, (size,), generator=draw),
            )
            for _ in range(number)
        ]

    def inner(self, model: nn.Module) -> Any:
        """The optimizer by itself, in its training mode."""
        inner = self.make([p for p in model.parameters() if p.requires_grad])
        switch_to_training(inner)
        return inner

    def survives(self, copying: Callable[[Any], Any]) -> bool:
        """Whether a copy of the plain optimizer can still step; LBFGS' cannot, for one."""
        batches = self.batches()
        run = PlainRun(Run(self).train(batches))
        run.step(*batches[0])
        try:
            run.model, run.optimizer = copying((run.model, run.optimizer))
            run.step(*batches[0])
        except (AttributeError, KeyError, TypeError):
            return False
        return True


def switch_to_training(optimizer: Any) -> None:
    if hasattr(optimizer, "train"):  # schedule-free ones
        optimizer.train()


class Run:
    """One training: a model, its criterion, and IRWOptimizer around an inner optimizer."""

    def __init__(self, inner: Inner, model: nn.Module | None = None, **options: Any) -> None:
        self.kind = inner
        self.model = inner.model() if model is None else model
        self.criterion = nn.CrossEntropyLoss()
        options = {"alpha": ALPHA, **options}
        self.optimizer = IRWOptimizer(
            inner.inner(self.model), model=self.model, criterion=self.criterion, **options
        )
        self.gradients: list[list[Tensor]] = []
        self.losses: list[Tensor] = []

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.criterion(self.model(x), y)
        loss.backward()
        self.gradients.append([p.grad.clone() for p in self.parameters])
        self.losses.append(loss.detach())
        return loss

    def step(self, x: Tensor, y: Tensor) -> Any:
        if not self.kind.closure:
            self.evaluate(x, y)
            return self.optimizer.step()
        if self.kind.closure == "evaluates":
            return self.optimizer.step(lambda: self.evaluate(x, y))
        loss = self.evaluate(x, y)  # there must be a gradient at hand before the step
        if self.kind.closure == "evaluates again":
            return self.optimizer.step(lambda: self.evaluate(x, y))
        return self.optimizer.step(loss.item)

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Run:
        for x, y in batches:
            self.step(x, y)
        return self


class CheckedRun(Run):
    """Compares every gradient with the oracle's loop over the samples."""

    error = 0.0

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            losses = nn.functional.cross_entropy(self.model(x), y, reduction="none")
        oracle = reference.step(losses, self.parameters, ALPHA)
        loss = super().evaluate(x, y)
        found = [p.grad.to_dense() for p in self.parameters]
        self.error = max(self.error, distance(found, oracle.gradients))
        return loss


class PlainRun(Run):
    """The inner optimizer alone, given the losses and gradients of another run in their order."""

    def __init__(self, other: Run) -> None:
        self.kind = other.kind
        self.model = other.kind.model()
        self.optimizer = other.kind.inner(self.model)
        self.given = zip(other.losses, other.gradients, strict=True)

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        loss, gradients = next(self.given)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        return loss


def distance(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The largest relative difference."""
    return max(reference.error(a.detach(), b.detach()) for a, b in zip(one, other, strict=True))


def same(one: Any, other: Any) -> bool:
    """Whether two state dicts are equal to the last bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(_dense(one), _dense(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _loading(name: str, **options: Any) -> Callable[[Parameters], Any]:
    return lambda parameters: pytorch_optimizer.load_optimizer(name)(parameters, **options)


def _muon_of_pytorch_optimizer(parameters: Parameters) -> Any:
    return pytorch_optimizer.Muon([{"params": list(parameters), "use_muon": True}], lr=1e-2)


TORCH = [
    Inner("ASGD", lambda p: optim.ASGD(p, lr=0.1)),
    Inner("Adadelta", lambda p: optim.Adadelta(p)),
    Inner("Adafactor", lambda p: optim.Adafactor(p)),
    Inner("Adagrad", lambda p: optim.Adagrad(p, lr=0.1)),
    Inner("Adam", lambda p: optim.Adam(p, lr=1e-2)),
    Inner("Adam-amsgrad-maximize", lambda p: optim.Adam(p, amsgrad=True, maximize=True)),
    Inner("Adam-foreach", lambda p: optim.Adam(p, foreach=True)),
    Inner("Adam-fused", lambda p: optim.Adam(p, fused=True)),
    Inner("AdamW", lambda p: optim.AdamW(p)),
    Inner("AdamW-fused", lambda p: optim.AdamW(p, fused=True)),
    Inner("Adamax", lambda p: optim.Adamax(p)),
    Inner("LBFGS", lambda p: optim.LBFGS(p, lr=0.1, max_iter=4), closure="evaluates"),
    Inner("NAdam", lambda p: optim.NAdam(p)),
    Inner("RAdam", lambda p: optim.RAdam(p)),
    Inner("RMSprop", lambda p: optim.RMSprop(p, momentum=0.9, centered=True)),
    Inner("Rprop", lambda p: optim.Rprop(p)),
    Inner("SGD", lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3)),
    Inner("SGD-nesterov-foreach", lambda p: optim.SGD(p, 0.1, 0.9, nesterov=True, foreach=True)),
    Inner("SGD-fused", lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True)),
    Inner("SparseAdam", lambda p: optim.SparseAdam(list(p)), sparse=True),
]
if hasattr(optim, "Muon"):  # newer than the lowest torch supported
    TORCH.append(Inner("Muon", lambda p: optim.Muon(p, lr=1e-2), matrices_only=True))

SCHEDULE_FREE = [
    Inner("SGDScheduleFree", lambda p: schedulefree.SGDScheduleFree(p, lr=0.1)),
    Inner("AdamWScheduleFree", lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2)),
    Inner("RAdamScheduleFree", lambda p: schedulefree.RAdamScheduleFree(p, lr=1e-2)),
    Inner(
        "ScheduleFreeWrapper",
        lambda p: schedulefree.ScheduleFreeWrapper(optim.SGD(p, lr=0.1), momentum=0.9),
    ),
    Inner(
        "AdamWScheduleFreeClosure",
        lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=1e-2),
        closure="evaluates",
    ),
]

PYTORCH_OPTIMIZER = [
    Inner("ADOPT", _loading("adopt")),
    Inner("AdaBelief", _loading("adabelief")),
    Inner("Adan", _loading("adan")),
    Inner("AliG", _loading("alig"), closure="tells the loss"),
    Inner("LARS", _loading("lars")),
    Inner("Lamb", _loading("lamb")),
    Inner("Lion", _loading("lion")),
    Inner("Muon-mixed", _muon_of_pytorch_optimizer, matrices_only=True),
    Inner("Prodigy", _loading("prodigy")),
    Inner("SOAP", _loading("soap")),
    Inner("Shampoo", _loading("shampoo")),
    Inner("StableAdamW", _loading("stableadamw")),
    Inner("Lookahead", lambda p: pytorch_optimizer.Lookahead(optim.SGD(p, lr=0.1), k=2)),
    Inner(
        "SAM",
        lambda p: pytorch_optimizer.SAM(list(p), base_optimizer=optim.SGD, lr=0.1),
        closure="evaluates again",
    ),
]

ALL = [
    *TORCH,
    *(SCHEDULE_FREE if schedulefree else ()),
    *(PYTORCH_OPTIMIZER if pytorch_optimizer else ()),
]

every_inner = pytest.mark.parametrize("inner", ALL, ids=str)

SGD = next(inner for inner in ALL if inner.name == "SGD")
ADAM = next(inner for inner in ALL if inner.name == "Adam")
