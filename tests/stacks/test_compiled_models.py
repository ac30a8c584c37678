"""torch.compile and models of many kinds: exact in every order, fused between the layers."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import reference
import torch
import torch._functorch.config
import torch.nn.functional as F
from common import INDUCTOR
from torch import Tensor, nn
from torch._dynamo.utils import counters

from irw_optim import IRWOptimizer
from irw_optim.gradients import compiling
from irw_optim.gradients.graph import walk
from irw_optim.gradients.hooks import hook_layers

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about itself

ALPHA, CLASSES, WIDTH = 0.4, 3, 8
SIZES = (6, 3)
"""A batch, and a shorter one that ends the epoch."""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Pooled(nn.Module):
    """Layers over (B, T, d), a mean over T, a class."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Gated(nn.Module):
    """A gated MLP with a norm that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (WIDTH,), self.scale)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Places(nn.Module):
    """A row for every position, the same for all samples: where the two meet is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.rows(torch.arange(x.shape[1])))


class Behind(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) @ self.layer.weight)


class Computed(nn.Module):
    """A layer whose weight is computed of what it holds in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterDict(
            {"left": torch.randn(WIDTH, 2), "right": torch.randn(2, WIDTH)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parts["left"] @ self.parts["right"])


class Holder(nn.Module):
    """Holds a token and a row for every position by itself, and calls blocks that hold nothing."""

    def __init__(self, positions: Callable[[], nn.Module | nn.Parameter]) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = positions()
        self.blocks = nn.ModuleList(Activated() for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        rows = self.positions
        x = x + (rows(torch.arange(6)) if isinstance(rows, nn.Module) else rows)
        for block in self.blocks:
            x = block(x)
        return x


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(F.gelu(x).sin()).tanh().cos()


class Named(nn.Module):
    """Positions of a model that holds nothing by itself: where they meet the samples is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, WIDTH)
        self.blocks = nn.Sequential(*(Activated() for _ in range(10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.gelu(x + self.rows(torch.arange(x.shape[1]))))


class TimeFirst(nn.Module):
    """The batch comes second in what its layer reads, whose shape says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer(x.transpose(0, 1).sin()).cos().transpose(0, 1))


class Meeting(nn.Module):
    """Samples meet in what is fused, where no graph shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).sin()
        return F.gelu(hidden - hidden.mean(0))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def convolutions() -> nn.Module:
    return Pooled(
        Transposed(), nn.Conv1d(WIDTH, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.GELU(),
        nn.Conv1d(12, WIDTH, 3, padding=1), nn.GELU(), Transposed(),
    )  # fmt: skip


KINDS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions,
    "attention": lambda: Pooled(SelfAttention(), nn.LayerNorm(WIDTH)),
    "encoder": lambda: Pooled(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)),
    "gated": lambda: Pooled(Gated(), Gated()),
    "places": lambda: Pooled(nn.Linear(WIDTH, WIDTH), Places()),
    "batch norm": lambda: Pooled(Transposed(), nn.BatchNorm1d(WIDTH), nn.GELU(), Transposed()),
    "behind": lambda: Pooled(Behind(), nn.GELU()),
    "time first": lambda: Pooled(nn.Linear(WIDTH, WIDTH), TimeFirst()),
    "meeting": lambda: Pooled(Meeting(), nn.GELU()),
    "computed": lambda: Pooled(Computed(), Activated()),
    "held": lambda: Pooled(Holder(lambda: nn.Parameter(torch.randn(6, WIDTH)))),
    "held, embedded": lambda: Pooled(Holder(lambda: nn.Embedding(6, WIDTH))),
    "deep, places": lambda: Pooled(Named()),
}
KEPT_OUT = {"places", "batch norm", "behind", "meeting"}
"""Not all of their parameters are read where the graph shows it, or they meet there."""

DEEP = {"held", "held, embedded", "deep, places"}
"""The ten blocks of them are compiled, though the model around them is not."""


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().double()


def draw(seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [
        (torch.randn(size, 5, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (size,)))
        for size in SIZES
    ]


def attach(model: nn.Module, criterion: nn.Module) -> IRWOptimizer:
    return IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA, model=model, criterion=criterion
    )


def before(model: nn.Module, criterion: nn.Module, backend: str) -> tuple[IRWOptimizer, nn.Module]:
    compiled = torch.compile(model, backend=backend)
    return attach(compiled, criterion), compiled


def after(model: nn.Module, criterion: nn.Module, backend: str) -> tuple[IRWOptimizer, nn.Module]:
    optimizer = attach(model, criterion)
    return optimizer, torch.compile(model, backend=backend)


def in_place(
    model: nn.Module, criterion: nn.Module, backend: str
) -> tuple[IRWOptimizer, nn.Module]:
    model.compile(backend=backend)
    return attach(model, criterion), model


def in_place_after(
    model: nn.Module, criterion: nn.Module, backend: str
) -> tuple[IRWOptimizer, nn.Module]:
    optimizer = attach(model, criterion)
    model.compile(backend=backend)
    return optimizer, model


def train(
    kind: str, order: Callable[..., tuple[IRWOptimizer, nn.Module]], backend: str
) -> tuple[IRWOptimizer, nn.Module]:
    """Three epochs, every step compared; the third compiles nothing."""
    model, twin, criterion = make(kind), make(kind), nn.CrossEntropyLoss()
    optimizer, call = order(model, criterion, backend)
    graphs = []
    for epoch in range(3):
        for x, y in draw(epoch):
            twin.load_state_dict(model.state_dict())
            losses = F.cross_entropy(twin(x), y, reduction="none")
            oracle = reference.step(losses, twin.parameters(), ALPHA)
            optimizer.zero_grad()
            criterion(call(x), y).backward()
            floor = 0.1 * max(float(g.abs().max()) for g in oracle.gradients)
            for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
                assert reference.error(p.grad, gradient, floor) < 1e-9
            optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]
    assert not [reason for reason in counters["graph_break"] if "limit" in reason]
    return optimizer, model


def compiled_regions(model: nn.Module) -> int:
    """How many there are behind what a model computes now."""
    output = model(torch.randn(SIZES[0], 5, WIDTH, dtype=torch.float64))
    return sum(map(compiling.is_compiled, walk(output.sum(1)).order))


@pytest.mark.slow
@pytest.mark.parametrize("order", [before, after, in_place, in_place_after])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exact_in_every_order(
    kind: str, order: Callable[..., tuple[IRWOptimizer, nn.Module]]
) -> None:
    optimizer, _ = train(kind, order, "aot_eager")
    assert not optimizer.engine.known.get("row_by_row")


def test_compiled_after_the_optimizer_came() -> None:
    train("gated", after, "aot_eager")


def test_blocks_are_compiled_again_in_a_model_that_was_compiled_after() -> None:
    _, model = train("deep, places", in_place_after, "aot_eager")
    assert compiled_regions(model) >= 10


ATTENDING = pytest.param(
    "encoder",
    marks=pytest.mark.skipif(
        torch.__version__ < (2, 7), reason="torch's compiler mistakes attention's dtype"
    ),
)


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize("order", [before, after])
@pytest.mark.parametrize("kind", ["convolutions", ATTENDING, "gated", "places"])
def test_with_fused_kernels(
    kind: str, order: Callable[..., tuple[IRWOptimizer, nn.Module]], backend: str
) -> None:
    train(kind, order, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fused(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What lies between the layers; without quick products nothing, and the log says so once."""
    caplog.set_level("WARNING", "irw_optim")
    optimizer, model = train(kind, in_place, "aot_eager")
    said = Counter("leaves this model alone" in record.message for record in caplog.records)
    assert said[True] == (kind in KEPT_OUT)
    assert optimizer.engine.has_layer_hooks == (kind not in KEPT_OUT)
    regions = compiled_regions(model)
    assert regions >= 10 if kind in DEEP else (regions > 0) == (kind not in KEPT_OUT)
    layers = [module for module in make(kind).modules() if module._parameters]
    assert sum(counters["graph_break"].values()) <= 2 * len(layers)


class MeetingLater(nn.Module):
    """Between its layers samples meet, as much as a buffer says: no graph shows when it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("share", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden + self.share * hidden.sin().mean(0))


@pytest.mark.parametrize("begins", [4, 5, 6])
def test_mixing_that_begins_inside_of_a_region_is_exact_at_once(begins: int) -> None:
    """At a step at which no comparison with autograd would be due but for the region."""
    torch.manual_seed(0)
    model, criterion = MeetingLater().double(), nn.CrossEntropyLoss()
    optimizer = attach(model, criterion)
    model.compile(backend="aot_eager")
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for step in range(begins + 2):
        model.share.fill_(float(step >= begins))
        twin = MeetingLater().double()
        twin.load_state_dict(model.state_dict())
        losses = F.cross_entropy(twin(x), y, reduction="none")
        truth = reference.step(losses, twin.parameters(), ALPHA)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        for p, expected in zip(model.parameters(), truth.gradients, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
        optimizer.step()


def test_code_that_gives_its_memory_away_is_dropped() -> None:
    """What ran before the optimizer came lets a backward pass write over what it reads."""
    if not hasattr(torch._functorch.config, "donated_buffer"):
        pytest.skip("this torch gives nothing away")

    def run_before(
        model: nn.Module, criterion: nn.Module, backend: str
    ) -> tuple[IRWOptimizer, nn.Module]:
        compiled = torch.compile(model, backend=backend)
        torch._functorch.config.donated_buffer = True
        for x, y in draw(0):
            criterion(compiled(x), y).backward()
        return attach(model, criterion), compiled

    train("convolutions", run_before, "aot_eager")
    assert not torch._functorch.config.donated_buffer


def test_criterion_and_model_in_one_compiled_function() -> None:
    model, twin, criterion = make("gated"), make("gated"), nn.CrossEntropyLoss()
    optimizer = attach(model, criterion)
    loss_of = torch.compile(lambda x, y: criterion(model(x), y), backend="aot_eager")
    for x, y in [*draw(0), *draw(1)]:
        oracle = reference.step(
            F.cross_entropy(twin(x), y, reduction="none"), twin.parameters(), ALPHA
        )
        optimizer.zero_grad()
        loss_of(x, y).backward()
        for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
            assert reference.error(p.grad, gradient) < 1e-9


def test_recorders_leave_a_module_as_it_was() -> None:
    model = make("gated")
    hooks = hook_layers(model)
    for module in model.modules():
        plain = type(module).forward.__get__(module)
        assert inspect.signature(module.forward) == inspect.signature(plain)
    assert not any("forward" in vars(module) for module in copy.deepcopy(model).modules())
    del hooks
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_recorder_that_somebody_wrapped_passes_on() -> None:
    """As Accelerate wraps the forward that it finds."""
    model = make("gated")
    layer = model.head
    hooks = hook_layers(model)
    found = layer.forward
    layer.forward = lambda x: found(x)
    assert vars(copy.deepcopy(layer))["forward"] is layer.forward
    del hooks
    assert layer(torch.ones(2, WIDTH, dtype=torch.float64)).shape == (2, CLASSES)


def test_cuda_graphs_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.compile(make("gated"), mode="reduce-overhead")
    attach(model, nn.CrossEntropyLoss())  # on a CPU nothing is recorded
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match='compile it with mode="default"'):
        attach(model, nn.CrossEntropyLoss())


def test_recorded_regions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody could see how the model would be compiled."""
    forward = SimpleNamespace(compiled_fw=SimpleNamespace(fx_kwargs={"cudagraphs": True}))
    monkeypatch.setattr(compiling, "is_compiled", lambda node: True)
    with pytest.raises(RuntimeError, match="CUDA graphs"):
        compiling.compile_anew([SimpleNamespace(_forward_cls=forward)])
