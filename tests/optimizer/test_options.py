"""Options after the constructor: what may be set acts and is written down, the rest is refused."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWMonitor, IRWOptimizer
from irw_optim.optimizer.options import Options
from irw_optim.schemes import GlobalScheme
from irw_optim.weighting.weights import Alignment

B = 12


def losses_first(losses: Tensor, gradients: object, worst_off: Tensor) -> Tensor:
    return losses


def the_fourth(gram: Tensor) -> Tensor:
    return torch.arange(len(gram)) == 3


SETTABLE = {
    "alpha": 0.75,
    "outliers": the_fourth,
    "center": 1.0,
    "class_balance": True,
    "mix": 0.5,
    "warmup_steps": 2,
    "weighting": "cvar",
}
IMPOSSIBLE = {
    "alpha": 1.5,
    "outliers": 0.5,
    "center": -1.0,
    "class_balance": 1,
    "mix": 2.0,
    "warmup_steps": -1,
    "weighting": "dro",
}
CHOSEN_ONCE = {
    "accumulation_steps": 2,
    "score_parameters": "last",
    "worst_off": "local",
    "model": nn.Linear(4, 3),
    "criterion": nn.MSELoss(),
    "engine": "ghost",
    "processes": None,
    "inner": None,
}


def optimizer_with(**options: object) -> tuple[IRWOptimizer, nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"alpha": 0.25, **options}
    return IRWOptimizer(sgd, model=model, criterion=criterion, **options), model, criterion


def step(optimizer: IRWOptimizer, model: nn.Module, criterion: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(optimizer.steps)
    x = torch.randn(B, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (B,), generator=draw)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return optimizer.last_step.weights


@pytest.mark.parametrize("name", SETTABLE)
def test_an_option_that_is_set_is_as_good_as_one_that_was_given(name):
    value = SETTABLE[name]
    given, later = optimizer_with(**{name: value}), optimizer_with()
    setattr(later[0], name, value)
    assert getattr(later[0], name) == getattr(given[0], name) == value
    assert later[0].scheme == given[0].scheme
    assert later[0].state_dict() == given[0].state_dict()
    for _ in range(4):
        assert torch.equal(step(*later), step(*given))


@pytest.mark.parametrize("name", SETTABLE)
def test_it_changes_something(name):
    set_, left = optimizer_with(), optimizer_with()
    setattr(set_[0], name, SETTABLE[name])
    assert not torch.equal(step(*set_), step(*left))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_change_nothing(name):
    optimizer, *rest = optimizer_with()
    before, scheme = optimizer.state_dict(), optimizer.scheme
    with pytest.raises((TypeError, ValueError), match=f"{name}="):
        setattr(optimizer, name, IMPOSSIBLE[name])
    assert optimizer.state_dict() == before
    assert optimizer.scheme is scheme
    assert torch.equal(step(optimizer, *rest), step(*optimizer_with()))


def test_options_that_exclude_each_other_do_so_later_too():
    optimizer, *_ = optimizer_with(center=1.0)
    with pytest.raises(ValueError, match=r"center=1\.0 belongs to weighting='irw'"):
        optimizer.weighting = "cvar"
    optimizer.center = 0.0
    optimizer.weighting = "cvar"
    with pytest.raises(ValueError, match=r"center=0\.5 belongs to weighting='irw', not to 'cvar'"):
        optimizer.center = 0.5


@pytest.mark.parametrize("name", CHOSEN_ONCE)
def test_what_was_chosen_once_says_so(name):
    optimizer, *rest = optimizer_with()
    before = getattr(optimizer, name)
    with pytest.raises(
        AttributeError, match=rf"(?s)^{name}=.* was chosen .*detach\(\).*IRWOptimizer"
    ):
        setattr(optimizer, name, CHOSEN_ONCE[name])
    assert getattr(optimizer, name) is before
    step(optimizer, *rest)


class Slowed(torch.optim.SGD):
    """Has a setting of its own beside its groups."""

    share = 1.0

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.share)


def test_a_setting_of_the_inner_optimizer_is_set_there():
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    inner = Slowed(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=0.25, model=model, criterion=criterion)
    before = model.weight.detach().clone()
    optimizer.share, optimizer.note = 0.0, "of one's own"
    step(optimizer, model, criterion)
    assert torch.equal(model.weight, before)
    assert inner.share == optimizer.share == 0.0
    assert "share" not in vars(optimizer)
    assert "note" not in vars(inner)


@pytest.mark.parametrize("name", ["steps", "last_step", "local_scheme"])
def test_what_happened_cannot_be_set(name):
    optimizer, *_ = optimizer_with()
    with pytest.raises(AttributeError):
        setattr(optimizer, name, 3)


def test_a_scheme_that_is_set_says_the_options():
    optimizer, *rest = optimizer_with()
    optimizer.scheme = replace(optimizer.scheme, alpha=0.5, rule=Alignment(0.25), mix=0.125)
    said = optimizer.state_dict()["irw"]
    assert (said["alpha"], said["center"], said["mix"]) == (0.5, 0.25, 0.125)
    twin = optimizer_with(alpha=0.5, center=0.25, mix=0.125)
    assert torch.equal(step(optimizer, *rest), step(*twin))
    optimizer.scheme = replace(optimizer.scheme, rule=losses_first)
    assert optimizer.weighting is losses_first
    assert optimizer.state_dict()["irw"]["weighting"] == "losses_first"


def test_a_checkpoint_is_compared_with_what_holds_now(caplog):
    optimizer, *_ = optimizer_with()
    optimizer.alpha = 0.5
    state = optimizer.state_dict()
    with caplog.at_level(logging.WARNING, "irw_optim"):
        optimizer_with(alpha=0.5)[0].load_state_dict(state)
        assert not caplog.messages
        optimizer_with()[0].load_state_dict(state)
    assert caplog.messages == ["the checkpoint was made with alpha=0.5; training goes on with 0.25"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_options_of_their_own(how):
    optimizer, *rest = optimizer_with(weighting=losses_first)
    twin = how(optimizer)
    twin.alpha = 0.5
    assert (optimizer.alpha, twin.alpha) == (0.25, 0.5)
    step(optimizer, *rest)


def test_options_are_checked_as_one_and_never_change():
    options = Options(0.25, center=1.0)
    with pytest.raises(FrozenInstanceError):
        options.alpha = 0.5
    with pytest.raises(ValueError, match=r"center=1\.0 belongs to weighting='irw'"):
        replace(options, weighting="cvar")
    assert replace(options, alpha=np.float32(0.5)).described()["alpha"] == 0.5


def test_the_former_name_of_processes_says_the_new_one():
    optimizer, *_ = optimizer_with()
    with pytest.warns(DeprecationWarning, match="optimizer.processes"):
        assert optimizer.replicas is None


def data() -> TensorDataset:
    return TensorDataset(torch.randn(40, 4).double(), torch.randint(3, (40,)))


def test_a_global_scheme_renews_with_what_holds_then():
    optimizer, *_ = optimizer_with()
    scheme = GlobalScheme(optimizer, DataLoader(data(), batch_size=B))
    assert int(scheme.renew().worst_off.sum()) == 10
    optimizer.alpha = 0.5
    assert int(scheme.renew().worst_off.sum()) == 20
    scheme.detach()
    assert optimizer.scheme.alpha == 0.5


def test_a_global_scheme_that_is_gone_has_given_the_local_one_back():
    optimizer, *rest = optimizer_with()
    local = optimizer.scheme
    scheme = GlobalScheme(optimizer, DataLoader(data(), batch_size=B))
    assert optimizer.scheme is not local
    del scheme
    gc.collect()
    assert optimizer.scheme is local
    assert torch.equal(step(optimizer, *rest), step(*optimizer_with()))


def test_a_monitor_that_is_forgotten_listens_no_longer():
    optimizer, *rest = optimizer_with()
    kept = IRWMonitor(optimizer)
    IRWMonitor(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    step(optimizer, *rest)
    assert len(kept) == 1


def test_a_monitor_that_logs_need_not_be_kept():
    class Logger:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.steps.append(step)

    optimizer, *rest = optimizer_with()
    logger = Logger()
    IRWMonitor(optimizer).log_to(logger)
    for _ in range(3):
        step(optimizer, *rest)
    assert logger.steps == [1, 2, 3]
