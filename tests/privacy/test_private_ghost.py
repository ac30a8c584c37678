"""Ghost mode is the same mechanism: against the materialised rows, and against plain autograd."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from models import mlp
from opacus.utils.batch_memory_manager import BatchMemoryManager
from private_zoo import CLASSES, CONFIG, ZOO
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWOptimizer, PerSampleLoss
from irw_optim.gradients import magnitudes
from irw_optim.privacy import DPGuaranteeError, IRWPrivacyEngine
from irw_optim.privacy.pending import GhostBatch

B, N = 8, 32

# Norms of single layers ----------------------------------------------------------------------


class Twice(nn.Module):
    """One layer used at two places: its rows add up before the norm is taken."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x))


class Positions(nn.Module):
    """A parameter that is added, broadcast over the batch."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 6, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(x + self.positions))


def normal(*shape):
    return lambda: torch.randn(B, *shape).double()


def indices(*shape):
    return lambda: torch.randint(7, (B, *shape))


class TimeMajor(nn.Module):
    """As many steps as samples: the graph alone tells which is which."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 4)

    def forward(self, x):
        h = x.unsqueeze(0) * torch.arange(1.0, B + 1).double().view(B, 1, 1)
        return torch.tanh(self.hidden(h)).sum(0)


class Temperature(nn.Module):
    """Not linear in its parameter, but in what is computed of it."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.log.exp()


LAYERS = {
    "time first": (TimeMajor, normal(6)),
    "temperature": (Temperature, normal(3)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), normal(4)),
    "linear": (lambda: nn.Linear(4, 3), normal(4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), normal(4)),
    "linear, few positions": (lambda: nn.Linear(40, 30), normal(3, 40)),
    "linear, many positions": (lambda: nn.Linear(3, 2), normal(50, 3)),
    "linear, two position dimensions": (lambda: nn.Linear(4, 3), normal(2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), normal(4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), normal(4, 7, 6)),
    "conv2d, few positions": (lambda: nn.Conv2d(16, 12, 3, bias=False), normal(16, 3, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), normal(4, 5, 5)),
    "conv2d, circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        normal(2, 5, 5),
    ),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (1, 3), padding="same"), normal(2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), normal(2, 3, 4, 3)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), normal(2, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 3), indices(6)),
    "embedding with padding": (lambda: nn.Embedding(7, 3, padding_idx=2), indices(6)),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3, mode="mean"), indices(6)),
    "layer norm": (lambda: nn.LayerNorm(4), normal(3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), normal(4, 5)),
    "reused": (lambda: Twice(nn.Linear(4, 4)), normal(4)),
    "reused, with positions": (lambda: Twice(nn.Linear(4, 4)), normal(3, 4)),
    "reused convolution": (lambda: Twice(nn.Conv1d(2, 2, 3, padding=1)), normal(2, 5)),
    "tied": (Tied, indices(5)),
    "positions": (Positions, normal(6, 4)),
    "frozen weight": (lambda: nn.Linear(4, 3), normal(3, 4)),
    "frozen bias": (lambda: nn.Conv1d(2, 3, 2), normal(2, 5)),
}


@pytest.mark.parametrize("block", ["one block", "sample by sample"])
@pytest.mark.parametrize("name", LAYERS)
def test_norms_of_a_layer_are_those_of_autograd(name, block, monkeypatch):
    torch.manual_seed(0)
    if block == "sample by sample":
        monkeypatch.setattr(magnitudes, "MEMORY_BOUND", 1)
    build, inputs = LAYERS[name]
    layer = build().double()
    if name.startswith("frozen"):
        getattr(layer, name.removeprefix("frozen ")).requires_grad_(False)
    x = inputs()
    criterion = PerSampleLoss(lambda output: (output.flatten(1).sin() * 3).sum(1))
    pending = GhostBatch("mean", layer)
    pending.follow(criterion, layer)
    criterion(layer(x)).backward()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    rows = pending.rows(parameters, B)
    pending.unfollow()

    losses = criterion.function(layer(x))
    expected = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected.append(sum(g.square().sum() for g in gradients).sqrt())
    torch.testing.assert_close(rows.norms(), torch.stack(expected), rtol=1e-9, atol=1e-9)


# Whole trainings -----------------------------------------------------------------------------


def private(mode, kind, *, seed=0, config=CONFIG, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    build, draw = ZOO[kind]
    generator = torch.Generator().manual_seed(1)
    x = draw(N, generator)
    data = TensorDataset(
        x.to(dtype) if x.is_floating_point() else x,
        torch.randint(0, CLASSES, (N,), generator=generator),
    )
    model = build().to(dtype)
    criterion = nn.CrossEntropyLoss()
    engine = IRWPrivacyEngine(accountant="rdp")
    model, optimizer, _ = engine.make_private(
        **{
            "module": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
            "data_loader": DataLoader(data, batch_size=B),
            "criterion": criterion,
            "noise_multiplier": 0.5,
            "max_grad_norm": 0.7,
            "irw": config,
            "noise_generator": torch.Generator().manual_seed(seed),
            "grad_sample_mode": mode,
            **options,
        }
    )
    batches = [list(range(8)), [1, 9, 30], [], [5], list(range(10, 22)), list(range(8))]
    return engine, model, optimizer, DataLoader(data, batch_sampler=batches), criterion


def train(model, optimizer, loader, criterion):
    for x, y in loader:
        optimizer.zero_grad()
        if len(x):
            criterion(model(x), y).backward()
            optimizer.step()
        else:
            optimizer.step(losses=torch.zeros(0))


def with_empty(loader):
    data = loader.dataset.tensors
    return [tuple(t[rows] for t in data) for rows in loader.batch_sampler]


def outcome(model, optimizer):
    state = optimizer.public_state
    return [
        *(p.detach() for p in model.parameters()),
        torch.tensor([state.threshold, state.scale]),
        *state.direction.values(),
    ]


@pytest.mark.parametrize("direction_share", [0.1, 0.0])
@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_training_is_the_materialised_one(kind, direction_share, dtype, tolerance):
    """Same noise, batches of all sizes: the same parameters and the same public state."""
    config = replace(CONFIG, direction_share=direction_share)
    outcomes = []
    for mode in ("hooks", "ghost"):
        engine, model, optimizer, loader, criterion = private(
            mode, kind, config=config, dtype=dtype
        )
        train(model, optimizer, with_empty(loader), criterion)
        assert engine.accountant.history == [(0.5, B / N, 6)]
        outcomes.append(outcome(model, optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ZOO)
def test_physical_batches_in_ghost_mode(kind):
    outcomes = []
    for size in (3, 100):
        _, model, optimizer, loader, criterion = private("ghost", kind)
        loader = DataLoader(loader.dataset, batch_sampler=[b for b in loader.batch_sampler if b])
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=size, optimizer=optimizer
        ) as batches:
            train(model, optimizer, batches, criterion)
        outcomes.append(outcome(model, optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class LargestTensor(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["mlp", "transformer", "cnn_group_norm"])
def test_no_tensor_of_batch_times_parameters_is_made(kind):
    """Nor of batch times the largest layer, which grad_sample needs."""
    largest = {}
    for mode in ("hooks", "ghost"):
        torch.manual_seed(0)
        _, draw = ZOO[kind]
        x = draw(B, torch.Generator().manual_seed(0))
        model = {  # wide, so that parameters outnumber activations
            "mlp": lambda: mlp(6, 256, 256),
            "transformer": lambda: nn.Sequential(
                nn.Embedding(11, 128), nn.LayerNorm(128), nn.Linear(128, 256), nn.Flatten()
            ),
            "cnn_group_norm": lambda: nn.Sequential(
                nn.Conv2d(2, 64, 3, stride=4),
                nn.GroupNorm(2, 64),
                nn.Conv2d(64, 128, 2),
                nn.Flatten(),
            ),
        }[kind]()
        layer = max(p.numel() for p in model.parameters())
        x = x.float() if x.is_floating_point() else x
        _, model, optimizer, _, criterion = private(
            mode, kind, module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )
        y = torch.zeros(B).long()
        train(model, optimizer, [(x, y), (x, y)], criterion)  # with the check of the first step
        with LargestTensor() as watch:
            train(model, optimizer, [(x, y)], criterion)
        largest[mode] = watch.numbers / (B * layer)
    assert largest["hooks"] >= 1
    assert largest["ghost"] < 0.5


def test_no_gradient_without_noise_reaches_the_parameters():
    _, model, optimizer, loader, criterion = private("ghost", "mlp")
    x, y = loader.dataset.tensors
    criterion(model(x), y).backward()
    assert all(p.grad is None and p.grad_sample is None for p in model.parameters())
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_contributes_nothing(kind, value):
    outcomes = []
    for batch in (list(range(8)), [0, 1, 2, 4, 5, 6, 7]):
        _, model, optimizer, loader, criterion = private("ghost", kind)
        x, y = loader.dataset.tensors
        if x.is_floating_point():
            x[3] = value
        else:  # through the loss's own input instead
            original = model.forward
            model.forward = lambda t, original=original: (
                original(t)
                * torch.where((torch.arange(len(t)) == 3) & (len(t) == 8), value, 1.0).unsqueeze(1)
            )
        for _ in range(2):
            train(model, optimizer, [(x[batch], y[batch])], criterion)
        outcomes.append(outcome(model, optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_factor_on_the_loss_scales_the_rows_as_it_does_in_hooks_mode():
    outcomes = []
    for mode in ("hooks", "ghost"):
        _, model, optimizer, loader, criterion = private(mode, "mlp")
        x, y = loader.dataset.tensors
        for _ in range(3):
            optimizer.zero_grad()
            (0.05 * criterion(model(x), y)).backward()
            optimizer.step()
        outcomes.append(outcome(model, optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_sum_reduction():
    outcomes = []
    for mode in ("hooks", "ghost"):
        criterion = nn.CrossEntropyLoss(reduction="sum")
        _, model, optimizer, loader, _ = private(
            mode, "mlp", criterion=criterion, loss_reduction="sum"
        )
        train(model, optimizer, [loader.dataset.tensors] * 2, criterion)
        outcomes.append(outcome(model, optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_resuming_is_exact(tmp_path):
    engine, model, optimizer, loader, criterion = private("ghost", "mlp")
    batches = with_empty(loader)
    train(model, optimizer, batches[:3], criterion)
    engine.save_checkpoint(path=tmp_path / "half", module=model, optimizer=optimizer)
    noise = optimizer.generator.get_state()
    train(model, optimizer, batches[3:], criterion)
    again = private("ghost", "mlp", seed=5)
    again[0].load_checkpoint(path=tmp_path / "half", module=again[1], optimizer=again[2])
    again[2].generator.set_state(noise)
    train(again[1], again[2], batches[3:], again[4])
    for a, b in zip(outcome(model, optimizer), outcome(again[1], again[2]), strict=True):
        assert torch.equal(a, b)


def test_detach_leaves_model_and_criterion_as_they_were():
    _, model, optimizer, _, criterion = private("ghost", "mlp")
    assert any("forward" in vars(m) for m in model.modules())
    optimizer.detach()
    assert not any("forward" in vars(m) for m in [*model.modules(), criterion])


def test_hooks_go_with_the_optimizer():
    _, model, optimizer, loader, criterion = private("ghost", "mlp")
    train(model, optimizer, [loader.dataset.tensors], criterion)
    del optimizer, criterion
    gc.collect()
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


# Refusals ------------------------------------------------------------------------------------


def test_a_forward_that_mixes_the_samples_is_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            h = self.first(x)
            return self.second(torch.tanh(h - h.mean(0)))

    model = Mixing().double()
    _, _, optimizer, loader, criterion = private(
        "ghost", "mlp", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    x, y = loader.dataset.tensors
    with pytest.raises(NotImplementedError, match=r"does not cover .*first.weight.*mix samples"):
        criterion(model(x), y).backward()
    with pytest.raises(DPGuaranteeError, match="losses are missing"):
        optimizer.step()


def test_a_layer_that_is_not_covered_is_named():
    model = mlp(6, 4, CLASSES, norm=nn.BatchNorm1d, act=None).double()
    pending = GhostBatch("mean", model)
    criterion = nn.CrossEntropyLoss()
    pending.follow(criterion, model)
    with pytest.raises(NotImplementedError, match=r"does not cover .*1\.weight"):
        criterion(model(torch.randn(B, 6).double()), torch.randint(CLASSES, (B,))).backward()
    pending.unfollow()


def test_another_term_in_the_loss_is_refused():
    _, model, optimizer, loader, criterion = private("ghost", "mlp")
    x, y = loader.dataset.tensors
    output = model(x)
    with pytest.raises(NotImplementedError, match="another term of the loss"):
        (criterion(output, y) + 0.1 * output.square().mean()).backward()
    optimizer.zero_grad()


def test_accumulation_and_losses_by_hand_are_refused():
    _, model, optimizer, loader, criterion = private("ghost", "mlp")
    x, y = loader.dataset.tensors
    criterion(model(x), y).backward()
    with pytest.raises(DPGuaranteeError, match="losses has 3 samples"):
        optimizer.step(losses=torch.zeros(3))
    criterion(model(x), y).backward()
    with pytest.raises(DPGuaranteeError, match="2 backward passes"):
        optimizer.step()
    with pytest.raises(DPGuaranteeError, match="2 backward passes"):
        optimizer.step(losses=torch.zeros(len(x)))
    assert optimizer.public_state.steps == 0


def test_going_backward_twice_is_refused():
    _, model, _, loader, criterion = private("ghost", "mlp")
    x, y = loader.dataset.tensors
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(DPGuaranteeError, match="went backward already"):
        loss.backward()


def test_ghost_mode_asks_for_a_criterion_and_batch_first():
    with pytest.raises(ValueError, match="without a criterion"):
        private("ghost", "mlp", criterion=None)
    with pytest.raises(NotImplementedError, match="batch_first=False"):
        private("ghost", "mlp", batch_first=False)


def test_a_model_in_ghost_mode_is_not_taken_twice():
    _, model, optimizer, loader, criterion = private("ghost", "mlp")
    again = {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(DPGuaranteeError, match="attached to the model"):
        private("ghost", "mlp", **again)
    optimizer.detach()
    _, model, optimizer, loader, criterion = private("ghost", "mlp", **again)
    train(model, optimizer, [loader.dataset.tensors], criterion)
    assert optimizer.public_state.steps == 1


def test_a_plain_irw_optimizer_after_a_private_one_is_exact_again():
    _, model, optimizer, loader, criterion = private("ghost", "mlp")
    optimizer.detach()
    plain = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model, criterion=criterion
    )
    x, y = loader.dataset.tensors
    criterion(model(x), y).backward()
    plain.step()
    assert plain.last_step.weights.sum().item() == pytest.approx(1)
