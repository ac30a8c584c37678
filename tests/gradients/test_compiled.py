"""``compile=True``: the same step, and what is left uncompiled or refused."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from models import mlp
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.gradients import compiled

B, ALPHA = 8, 0.3

pytestmark = pytest.mark.cpu("the pretended device has no compiler")


@pytest.fixture
def traced(monkeypatch) -> None:
    """Programs run as they were traced: no kernel is built, which takes seconds."""
    monkeypatch.setattr(compiled, "built", lambda graph, tensors: graph)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x + self.position).mean(1))


class Tied(nn.Module):
    """An embedding that is the output's matrix, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.between = nn.Embedding(7, 6, padding_idx=0), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.between(self.table(tokens)) @ self.table.weight.t()).mean(1)[:, :3]


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def cnn() -> nn.Module:
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)]
    parts += [nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*parts)


def tokens(size: int) -> Tensor:
    return torch.randint(0, 7, (size, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "MLP": (lambda: mlp(4, 6, 3), lambda n: torch.randn(n, 4)),
    "CNN": (cnn, lambda n: torch.randn(n, 2, 8, 8)),
    "transformer": (Attending, lambda n: torch.randn(n, 5, 8)),
    "tied table": (Tied, tokens),
    "table": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), tokens),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)), tokens),
    "LSTM": (Reading, lambda n: torch.randn(n, 5, 4)),
}


class Training:
    """Each pass equal to the loop of plain autograd, and to ``compile=False``."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        self.model, self.twin = model.double(), copy.deepcopy(model).double()
        self.optimizer = self.wrapped(self.model, compile=True, **options)
        self.plain = self.wrapped(self.twin, **options)

    @staticmethod
    def wrapped(model: nn.Module, **options: object) -> IRWOptimizer:
        return IRWOptimizer(
            torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model, **options
        )

    def step(self, x: Tensor) -> None:
        x, y = x.double() if x.is_floating_point() else x, torch.randint(3, (len(x),))
        losses = [F.cross_entropy(m(x), y, reduction="none") for m in (self.model, self.twin)]
        of_the_loop = F.cross_entropy(self.model(x), y, reduction="none")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        scored = self.optimizer.scored_parameters()
        truth = reference.step(of_the_loop, parameters, self.optimizer.alpha, scored=scored)
        for optimizer, some in zip((self.optimizer, self.plain), losses, strict=True):
            optimizer.zero_grad()
            optimizer.backward(some)
        agree(self.optimizer, self.model, truth, 1e-10)
        for p, other in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            assert (p.grad is None) == (other.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-10, atol=1e-10)
        self.optimizer.step()
        self.plain.step()

    @property
    def programs(self) -> list[object]:
        return list(self.optimizer.engine.programs.values())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("traced")
def test_exact_with_a_short_last_batch(kind):
    made, drawn = MODELS[kind]
    training = Training(made())
    for size in [B, B, B, B, B - 3] * 3:
        training.step(drawn(size))
    assert len(training.programs) == 4  # scores and gradient, of two shapes
    assert None not in training.programs


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch's compiler needs a C++ compiler and Python's headers",
)
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("kind", ["MLP", "tied table"])
def test_exact_with_kernels(kind):
    made, drawn = MODELS[kind]
    training = Training(made())
    for _ in range(7):
        training.step(drawn(B))
    assert len(training.programs) == 2
    assert None not in training.programs


@pytest.mark.usefixtures("traced")
def test_a_model_and_options_that_change():
    training = Training(cnn())
    for number in range(24):
        if number == 6:
            for optimizer in (training.optimizer, training.plain):
                optimizer.alpha = 0.6
        if number == 12:  # the same shapes and the same graph, but for these settings
            for model in (training.model, training.twin):
                model[0].padding = model[0].dilation = (2, 2)
        if number == 18:
            for model in (training.model, training.twin):
                model[4].bias.requires_grad_(False)
        training.step(torch.randn(B, 2, 8, 8))
    assert len(training.programs) == 6
    assert None not in training.programs


@pytest.mark.usefixtures("traced")
def test_chosen_parameters():
    training = Training(cnn(), score_parameters="last")
    for _ in range(6):
        training.step(torch.randn(B, 2, 8, 8))
    assert len(training.programs) == 2


def run(options: dict[str, object], compile: bool) -> list[Tensor]:
    """The parameters at the end, with the attached criterion, and what has such a loop."""
    torch.manual_seed(0)
    model, criterion = mlp(4, 6, 3).double(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    wrapped = {"model": model, "criterion": criterion, "compile": compile}
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, **wrapped, **options)
    for number in range(16):
        x, y = torch.randn(B, 4).double(), torch.randint(3, (B,))
        optimizer.zero_grad()
        (criterion(model(x), y) * 0.5).backward()
        criterion(model(x[: B - 2]), y[: B - 2]).backward()
        optimizer.step()
        if number == 8:
            optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert bool(optimizer.engine.programs) is compile
    return [p.detach() for p in model.parameters()]


OPTIONS = [
    {"accumulation_steps": 2},
    {"outliers": DBSCANFilter()},
    {"center": 1.0, "mix": 0.1, "class_balance": True},
    {"engine": "ghost", "warmup_steps": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.usefixtures("traced")
def test_every_option_takes_the_same_steps(options):
    for mine, theirs in zip(run(options, True), run(options, False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("traced")
def test_copies_and_pickles_compile_anew():
    model = mlp(4, 6, 3)
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), alpha=ALPHA, model=model, compile=True
    )
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.compile is True
        for _ in range(4):
            copied.zero_grad()
            x, y = torch.randn(B, 4), torch.randint(3, (B,))
            copied.backward(F.cross_entropy(copied.model(x), y, reduction="none"))
            copied.step()
        assert len(copied.engine.programs) == 2
    assert not optimizer.engine.programs


def broken(graph: object, tensors: object) -> Callable[..., object]:
    raise RuntimeError("no working C++ compiler\nwas found")


def doubled(graph: Callable[..., list[Tensor]], tensors: object) -> Callable[..., object]:
    return lambda *tensors: [2 * t for t in graph(*tensors)]


@pytest.mark.parametrize(
    ("build", "reason"),
    [(broken, "RuntimeError: no working C++ compiler"), (doubled, "it differs by")],
)
def test_what_does_not_compile_is_left_and_said_once(build, reason, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "built", build)
    training = Training(mlp(4, 6, 3))
    with caplog.at_level(logging.WARNING, "irw_optim"):
        for size in [B, B, B, B, B - 2] * 2:
            training.step(torch.randn(size, 4))
    (told,) = caplog.messages
    assert told.startswith("compile=True")
    assert reason in told
    assert "was found" not in told
    assert training.programs == [None] * 4


@pytest.mark.usefixtures("traced")
def test_batches_of_many_shapes(caplog):
    training = Training(mlp(4, 6, 3))
    with caplog.at_level(logging.WARNING, "irw_optim"):
        for size in [B, B, *range(4, 20)] * 2:
            training.step(torch.randn(size, 4))
    assert len(training.programs) == compiled.MOST
    assert "16 programs" in caplog.messages[0]
    assert len(caplog.messages) == 1


@pytest.mark.usefixtures("traced")
def test_a_call_whose_way_no_key_tells(caplog):
    """Low-rank weights: how they are computed is a part of the graph."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Parameter(torch.randn(*s)) for s in ((3, 2), (2, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.left @ self.right)

    training = Training(LowRank())
    with caplog.at_level(logging.WARNING, "irw_optim"):
        for _ in range(6):
            training.step(torch.randn(B, 4))
    assert training.programs == []
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("value", ["reduce-overhead", {"mode": "max-autotune"}, 1, None])
def test_modes_are_refused(value):
    model = mlp(4, 6, 3)
    with pytest.raises(TypeError, match=r"compile=.*True or False; CUDA graphs") as told:
        IRWOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), alpha=ALPHA, model=model, compile=value
        )
    assert repr(value) in str(told.value)


def test_engines_without_products_are_refused():
    model = mlp(4, 6, 3)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for engine in ("autodiff", lambda losses, parameters: None):
        with pytest.raises(ValueError, match=r"compile=True .* expected compile=False"):
            IRWOptimizer(sgd, alpha=ALPHA, model=model, engine=engine, compile=True)
    with pytest.raises(ValueError, match="compile=True"):
        IRWOptimizer(sgd, alpha=ALPHA, engine="grad_sample", compile=True)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model)
    with pytest.raises(AttributeError, match="compile=False was chosen"):
        optimizer.compile = True
