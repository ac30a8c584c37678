"""make_private that fails, at whatever point, has changed nothing: the correct call comes after."""

import copy
import math

import pytest
import torch
from models import mlp
from opacus.accountants import RDPAccountant
from private_zoo import CLASSES, CONFIG
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from irw_optim.privacy import IRWDPConfig, IRWDPOptimizer, IRWPrivacyEngine
from irw_optim.privacy import engine as engines
from irw_optim.privacy.pending import GhostBatch, PendingBatch

N = 24
MODES = [("hooks", True), ("hooks", False), ("functorch", True), ("ew", True), ("ghost", True)]


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = mlp(4, 5, CLASSES, act=nn.ReLU)
    model[0].register_forward_hook(_unmoved)  # the user's own
    data = TensorDataset(torch.randn(N, 4), torch.randint(0, CLASSES, (N,)))
    return {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "data_loader": DataLoader(data, batch_size=6),
        "criterion": nn.CrossEntropyLoss(),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "irw": CONFIG,
    }


def _unmoved(module, inputs, output):
    return None


def attributes(thing):
    """By identity, tables of hooks by their contents."""
    return {
        name: (id(value), [*value.items()] if isinstance(value, dict) else None)
        for name, value in vars(thing).items()
    }


def footprint(engine, parts):
    """All that a call could have written to."""
    module = parts["module"]
    touched = [*module.modules(), *module.parameters()]
    touched += [parts["optimizer"], parts["data_loader"], parts["criterion"], engine]
    states = copy.deepcopy((module.state_dict(), parts["optimizer"].state_dict()))
    return [attributes(thing) for thing in touched], str(states), list(engine.accountant.history)


def trains(parts, engine):
    model, optimizer, loader = engine.make_private(**parts)
    model = model if callable(model) else parts["module"]
    for x, y in loader:
        optimizer.zero_grad()
        parts["criterion"](model(x), y).backward()
        optimizer.step()
    assert optimizer.public_state.steps == len(engine.accountant.history) or (
        engine.accountant.history[0][2] == optimizer.public_state.steps
    )
    assert optimizer.public_state.steps == 4


class BrokenError(Exception):
    pass


def fails(*_, **__):
    raise BrokenError


def interrupted(*_, **__):
    raise KeyboardInterrupt


class Unreadable(Dataset):
    """Its length is known at first."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        self.asked += 1
        if self.asked > 3:
            raise BrokenError
        return N

    def __getitem__(self, i):
        return torch.zeros(4), 0


def points(mode):
    """Where something can break on the way, first to last."""
    yield IRWPrivacyEngine, "_prepare_model"
    yield engines.PrivacyEngine, "_prepare_data_loader"
    yield IRWPrivacyEngine, "_prepare_optimizer"
    yield IRWDPOptimizer, "attach_step_hook"
    yield RDPAccountant, "get_optimizer_hook_fn"
    yield PendingBatch, "__init__"
    yield PendingBatch, "follow"
    if mode == "ghost":
        yield GhostBatch, "__init__"


@pytest.mark.parametrize("error", [fails, interrupted])
@pytest.mark.parametrize(("mode", "wrap"), MODES)
def test_whatever_breaks_on_the_way_leaves_no_trace(mode, wrap, error, parts, monkeypatch):
    parts |= {"grad_sample_mode": mode, "wrap_model": wrap}
    for owner, name in points(mode):
        engine = IRWPrivacyEngine(accountant="rdp")
        before = footprint(engine, parts)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, error)
            with pytest.raises((BrokenError, KeyboardInterrupt)):
                engine.make_private(**parts)
        assert footprint(engine, parts) == before, name
    if mode != "ew":  # which asks for hooks of the wrapper alone
        trains(parts, engine)


def test_a_data_set_that_breaks_leaves_no_trace(parts):
    changed = {**parts, "data_loader": DataLoader(Unreadable(), batch_size=6)}
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, changed)
    with pytest.raises(BrokenError):
        engine.make_private(**changed)
    assert footprint(engine, changed) == before
    trains(parts, engine)


class Buffered(nn.Module):
    """Opacus has no rule for it, and functorch none in strict mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, CLASSES))
        self.register_buffer("running", torch.zeros(1))

    def forward(self, x):
        return x @ self.weight


WRONG = {
    "reduction": ({"loss_reduction": "avg"}, ValueError, "loss_reduction='avg'"),
    "none": ({"loss_reduction": None}, ValueError, "loss_reduction=None"),
    "generator": ({"noise_generator": 3}, TypeError, "noise_generator=3: expected a torch.Gen"),
    "mode": ({"grad_sample_mode": "magic"}, NotImplementedError, "grad_sample_mode='magic'"),
    "no hooks": ({"grad_sample_mode": "ew", "wrap_model": False}, ValueError, "ew"),
    "clipping": ({"clipping": "per_layer"}, NotImplementedError, "clipping='per_layer'"),
    "noise": ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier=-1.0"),
    "module": ({"module": print}, TypeError, "module=.*expected the torch.nn.Module"),
    "loader": ({"data_loader": []}, TypeError, r"data_loader=\[\]: expected a torch.utils.data"),
    "optimizer": ({"optimizer": None}, TypeError, "optimizer=None: expected a torch optimizer"),
    "criterion": ({"criterion": nn.NLLLoss(reduction="sum")}, ValueError, "reduction='sum'"),
    "config": ({"irw": None}, TypeError, "irw=None"),
    "unknown": ({"alpha": 0.3}, TypeError, "unexpected keyword argument 'alpha'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_named_and_leave_no_trace(kind, parts):
    changes, error, message = WRONG[kind]
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, parts)
    with pytest.raises(error, match=message):
        engine.make_private(**{**parts, **changes})
    assert footprint(engine, parts) == before
    trains(parts, engine)


def test_parameters_of_another_model_are_named(parts):
    other = torch.optim.SGD(nn.Linear(7, 2).parameters(), lr=0.1)
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, parts)
    with pytest.raises(ValueError, match=r"2 parameters that are not the module's.*\(2, 7\)"):
        engine.make_private(**{**parts, "optimizer": other})
    assert footprint(engine, parts) == before
    trains(parts, engine)


def test_an_empty_data_set_is_named(parts):
    empty = TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"data_loader\.dataset is empty"):
        IRWPrivacyEngine(accountant="rdp").make_private(
            **{**parts, "data_loader": DataLoader(empty, batch_size=6)}
        )
    assert not hasattr(parts["module"], "autograd_grad_sample_hooks")


def test_models_that_opacus_refuses_are_as_before(parts):
    model = nn.Sequential(Buffered())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    changed = {**parts, "module": model, "optimizer": optimizer}
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, changed)
    with pytest.raises(NotImplementedError, match="buffer"):
        engine.make_private(**changed)
    assert footprint(engine, changed) == before
    parts["module"].eval()
    with pytest.raises(Exception, match="training mode"):
        engine.make_private(**parts)
    parts["module"].train()
    trains(parts, engine)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"target_epsilon": -1.0}, ValueError),
        ({"target_delta": 0.0}, Exception),
        ({"loss_reduction": "avg"}, ValueError),
    ],
)
def test_a_budget_that_cannot_be_met_leaves_no_trace(changes, error, parts):
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, parts)
    options = {"target_epsilon": 2.0, "target_delta": 1e-3, "epochs": 1}
    given = {k: v for k, v in parts.items() if k != "noise_multiplier"}
    with pytest.raises(error):
        engine.make_private_with_epsilon(**{**given, **options, **changes})
    assert footprint(engine, parts) == before
    model, optimizer, _ = engine.make_private_with_epsilon(**{**given, **options})
    assert optimizer.noise_multiplier > 0
    assert model(torch.zeros(2, 4)).shape == (2, CLASSES)


def test_an_optimizer_that_fails_by_itself_leaves_the_parameters_as_they_were(parts):
    before = [sorted(vars(p)) for p in parts["module"].parameters()]
    for change in ({"loss_reduction": "avg"}, {"expected_batch_size": None}, {"irw": None}):
        options = {
            "irw": IRWDPConfig(init_threshold=math.log(2)),
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "expected_batch_size": 4,
        }
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            IRWDPOptimizer(parts["optimizer"], **{**options, **change})
        assert [sorted(vars(p)) for p in parts["module"].parameters()] == before
