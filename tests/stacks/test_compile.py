"""torch.compile, before and after the hooks are on the model: exact, or torch says no itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from common import ALPHA, BATCHES, CLASSES, FEATURES, INDUCTOR, make_loader, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from irw_optim import IRWOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about itself


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 12, bias=False)
        self.norm = norm
        self.second = nn.Linear(12, 12)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).relu()
        return self.out(hidden + self.second(hidden).tanh())


def make_model(norm: str) -> Residual:
    torch.manual_seed(0)
    if norm == "layer":
        return Residual(nn.LayerNorm(12)).double()
    return Residual(nn.BatchNorm1d(12, track_running_stats=False)).double()


def attach(model: nn.Module, criterion: nn.Module) -> IRWOptimizer:
    return IRWOptimizer(sgd(model), alpha=ALPHA, model=model, criterion=criterion)


Parts = tuple[IRWOptimizer, Callable[[Tensor], Tensor]]


def hooks_first(model: nn.Module, criterion: nn.Module, **how: Any) -> Parts:
    optimizer = attach(model, criterion)
    return optimizer, torch.compile(model, **how)


def compiled_first(model: nn.Module, criterion: nn.Module, **how: Any) -> Parts:
    compiled = torch.compile(model, **how)
    return attach(compiled, criterion), compiled


def the_original_is_given(model: nn.Module, criterion: nn.Module, **how: Any) -> Parts:
    compiled = torch.compile(model, **how)
    return attach(model, criterion), compiled


def in_place(model: nn.Module, criterion: nn.Module, **how: Any) -> Parts:
    model.compile(**how)
    return attach(model, criterion), model


def run_before_the_hooks_came(model: nn.Module, criterion: nn.Module, **how: Any) -> Parts:
    compiled = torch.compile(model, **how)
    compiled(torch.randn(8, FEATURES, dtype=torch.float64))
    return attach(model, criterion), compiled


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(
    "order",
    [hooks_first, compiled_first, the_original_is_given, in_place, run_before_the_hooks_came],
    ids=lambda order: order.__name__,
)
def test_every_order_is_exact(order: Callable[..., Parts], norm: str, backend: str) -> None:
    model, twin, criterion = make_model(norm), make_model(norm), nn.CrossEntropyLoss()
    optimizer, call = order(model, criterion, backend=backend)
    for x, y in make_loader():
        x = x.double()
        twin.load_state_dict(model.state_dict())
        losses = cross_entropy(twin(x), y, reduction="none")
        oracle = reference.step(losses, twin.parameters(), ALPHA)
        optimizer.zero_grad()
        criterion(call(x), y).backward()
        for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
            assert reference.error(p.grad, gradient) < 1e-9
        optimizer.step()
    assert optimizer.steps == BATCHES


def test_hooks_on_a_model_that_was_compiled_and_run_before_are_not_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Dynamo does not look for new hooks; the log then says that autodiff does all the work."""
    model, criterion = make_model("layer"), nn.CrossEntropyLoss()
    caplog.set_level("INFO", "irw_optim")
    _, call = run_before_the_hooks_came(model, criterion, backend="aot_eager")
    x, y = next(iter(make_loader()))
    criterion(call(x.double()), y).backward()
    assert "quick products for 0 parameters" in caplog.text
    assert "does not currently support double backward" in caplog.text


def test_a_compiled_function_around_model_and_criterion() -> None:
    model, twin, criterion = make_model("layer"), make_model("layer"), nn.CrossEntropyLoss()
    optimizer = attach(model, criterion)

    @torch.compile(backend="eager")
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    x, y = next(iter(make_loader()))
    oracle = reference.step(
        cross_entropy(twin(x.double()), y, reduction="none"), twin.parameters(), ALPHA
    )
    loss_of(x.double(), y).backward()
    for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
        assert reference.error(p.grad, gradient) < 1e-9
    optimizer.step()


def test_of_a_compiled_training_step_the_weighing_is_not_compiled() -> None:
    """Dynamo would take every frame that runs inside of ``backward``, which takes half a minute."""
    model, criterion = make_model("layer"), nn.CrossEntropyLoss()
    optimizer = attach(model, criterion)
    compiled: list[str] = []

    def noting(graph: Any, inputs: Any) -> Any:
        frames = [node.stack_trace or "" for node in graph.graph.nodes]
        compiled.extend(frame for frame in frames if "weighted_loss" in frame)
        return graph.forward

    @torch.compile(backend=noting)
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    for x, y in make_loader():
        step(x.double(), y)
    assert not compiled
    assert optimizer.steps == BATCHES


def test_one_whole_graph_cannot_be_had() -> None:
    """Where the graph does not show its operations: it is noticed when the first step is over."""
    model, criterion = make_model("layer"), nn.CrossEntropyLoss()
    _, call = hooks_first(model, criterion, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, FEATURES, dtype=torch.float64)
    criterion(call(x), torch.zeros(8, dtype=torch.long)).backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?i)skip|disable"):
        call(x)


def test_a_compiled_criterion_is_refused_by_name() -> None:
    model = make_model("layer")
    with pytest.raises(TypeError, match=r"criterion OptimizedModule is compiled"):
        attach(model, torch.compile(nn.CrossEntropyLoss(), backend="eager"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step(backend: str) -> None:
    """The inner optimizer has a state, which has to be the same, too."""
    model, twin, criterion = make_model("layer"), make_model("layer"), nn.CrossEntropyLoss()
    inner, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model, criterion=criterion)
    step = torch.compile(optimizer.step, backend=backend)
    for x, y in make_loader():
        optimizer.zero_grad()
        criterion(model(x.double()), y).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        step()
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert optimizer.steps == BATCHES
