"""What an optimizer puts on a model and a criterion: once, as long as it lives, and in no copy."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import pickletools
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.fx
import torch.nn.functional as F
from agreement import agree
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from irw_optim import IRWOptimizer, verify
from irw_optim.criterion import attached
from irw_optim.distributed.replicas import Replicas
from irw_optim.gradients import compiling
from irw_optim.gradients.engine import Engine
from irw_optim.optimizer import irw_optimizer, weighted_backward

ALPHA, B = 0.3, 8


class Scaled(nn.Module):
    """A layer with a rule, and a parameter that a function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.layer = nn.Linear(4, 3)
        self.collects = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x * self.scale)
        if self.collects:
            gc.collect()
        return out


def make() -> nn.Module:
    return nn.Sequential(Scaled(), nn.ReLU(), nn.Linear(3, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 4).double(), torch.randint(3, (B,))


def over(model: nn.Module, criterion: nn.Module | None, **options: Any) -> IRWOptimizer:
    """By ghost products and autodiff, but never by falling back from what failed."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return IRWOptimizer(sgd, **{"alpha": ALPHA, "model": model, "criterion": criterion, **options})


def traces(*modules: nn.Module) -> list[tuple[dict[str, int], set[str]]]:
    """Of every module the hooks by kind, and the names of all attributes of its own."""
    every = [m for module in modules for m in module.modules()]
    return [
        ({k: len(v) for k, v in vars(m).items() if "hooks" in k and v is not None}, set(vars(m)))
        for m in every
    ]


def without_addresses(pickled: bytes) -> list[tuple[str, str | None]]:
    """What a pickle does, and its names; a tensor's bytes say where it was."""
    return [
        (operation.name, given if isinstance(given, str) and len(given) < 60 else None)
        for operation, given, _ in pickletools.genops(pickled)
    ]


class TrainsItself(nn.Module):
    """Has its optimizer and its criterion as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = over(self, self.criterion, engine="ghost")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def check_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: IRWOptimizer,
    body: nn.Module | None = None,
) -> None:
    x, y = batch()
    twin = make()
    twin.load_state_dict((body or model).state_dict())
    losses = F.cross_entropy(twin(x), y, reduction="none")
    truth = reference.step(losses, twin.parameters(), ALPHA)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    agree(optimizer, model, truth)
    optimizer.step()


def ghost_covers(optimizer: IRWOptimizer) -> bool:
    return bool(optimizer.engine.covered_parameters())


class TestOneSetOfHooks:
    def test_many_that_live_share_it(self):
        model = make()
        first = over(model, None)
        before = traces(model)
        more = [over(model, None) for _ in range(5)]
        assert traces(model) == before
        first.detach()
        for optimizer in more[:-1]:
            optimizer.detach()
        assert traces(model) == before
        more[-1].detach()
        assert traces(model) == traces(make())

    def test_each_is_exact_whoever_of_them_goes(self):
        model, criteria = make(), [nn.CrossEntropyLoss() for _ in range(3)]
        optimizers = [over(model, criterion) for criterion in criteria]
        while optimizers:
            for criterion, optimizer in zip(criteria, optimizers, strict=True):
                check_step(model, criterion, optimizer)
                assert ghost_covers(optimizer)
            optimizers.pop(0)
            criteria.pop(0)
            gc.collect()

    def test_opacus_hooks_are_silent_until_the_last_has_gone(self):
        model = GradSampleModule(nn.Linear(4, 3))
        first, second = over(model, None), over(model, None)
        assert not model.hooks_enabled
        assert copy.deepcopy(model).hooks_enabled
        first.detach()
        assert not model.hooks_enabled
        second.detach()
        assert model.hooks_enabled


class TestTheEndOfAnOptimizer:
    @pytest.mark.parametrize(
        "options",
        [{}, {"warmup_steps": 9}, {"accumulation_steps": 2}, {"weighting": "cvar"}],
        ids=str,
    )
    def test_leaves_nothing_though_losses_live_on(self, options):
        model, criterion = make(), nn.CrossEntropyLoss()
        before = traces(model, criterion)
        optimizer = over(model, criterion, **options)
        x, y = batch()
        kept = criterion(model(x), y)
        kept.backward()
        waiting = criterion(model(x), y)
        del optimizer
        gc.collect()
        assert traces(model, criterion) == before
        assert torch.equal(criterion(model(x), y), F.cross_entropy(model(x), y))
        assert kept.requires_grad
        assert waiting.requires_grad

    def test_a_scheduler_makes_a_cycle_which_is_no_hindrance(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        before = traces(model, criterion)
        optimizer = over(model, criterion)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        del optimizer
        gc.collect()
        assert traces(model, criterion) == before

    def test_a_model_that_knows_its_optimizer_is_collected_with_it(self):
        model = TrainsItself()
        watched = [weakref.ref(o) for o in (model, model.criterion, model.optimizer)]
        del model
        gc.collect()
        assert [o() for o in watched] == [None] * 3

    def test_in_the_middle_of_a_forward(self):
        """The collector comes when it likes: what a hook has begun is ended."""
        model, criterion = make(), nn.CrossEntropyLoss()
        before = traces(model, criterion)
        optimizer = over(model, criterion)
        optimizer.itself = optimizer
        model[0].collects = True
        gc.disable()
        try:
            del optimizer
            model(batch()[0])
        finally:
            gc.enable()
        assert traces(model, criterion) == before
        assert not torch.overrides._get_current_function_mode_stack()


class TestANewOneOverTheSameModel:
    def test_as_in_a_cell_that_runs_twice(self, caplog):
        model, criterion = make(), nn.CrossEntropyLoss()
        before = traces(model, criterion)
        with caplog.at_level(logging.INFO, "irw_optim"):
            for _ in range(3):
                optimizer = over(model, criterion)
                check_step(model, criterion, optimizer)
        told = [m for m in caplog.messages if "newer" in m]
        assert len(told) == 2
        optimizer.detach()
        assert traces(model, criterion) == before

    def test_the_older_one_knows_and_takes_nothing_back(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        older = over(model, criterion)
        newer = over(model, criterion)
        assert older.criterion is None
        assert newer.criterion is criterion
        older.detach()
        del older
        gc.collect()
        check_step(model, criterion, newer)

    def test_a_cell_that_makes_the_model_anew(self, monkeypatch):
        """In a notebook, where the names of the older ones are gone when the cell has run."""
        criterion = nn.CrossEntropyLoss()
        first = make()
        older = over(first, criterion)
        with pytest.raises(ValueError, match=r"attached to another IRWOptimizer.*detach\(\)"):
            over(make(), criterion)
        monkeypatch.setattr("irw_optim.criterion.attached.in_a_notebook", lambda: True)
        second = make()
        newer = over(second, criterion)
        check_step(second, criterion, newer)
        x, y = batch()
        criterion(first(x), y).backward()
        with pytest.raises(RuntimeError, match="not given to a newer IRWOptimizer"):
            older.step()
        newer.zero_grad()
        check_step(second, criterion, newer)

    def test_verify_is_no_newer_one(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        optimizer = over(model, criterion)
        with pytest.raises(ValueError, match=r"attached to another IRWOptimizer.*detach\(\)"):
            verify(model, *batch(), criterion)
        check_step(model, criterion, optimizer)
        assert verify(model, *batch(), nn.CrossEntropyLoss()).exact
        check_step(model, criterion, optimizer)

    def test_rounds_of_clients_and_folds(self):
        """The loader changes, and with it the optimizer; model and criterion stay."""
        model, criterion = make(), nn.CrossEntropyLoss()
        before = traces(model, criterion)
        for _ in range(4):
            optimizer = over(model, criterion)
            optimizer = torch.optim.lr_scheduler.StepLR(optimizer, 1).optimizer
            check_step(model, criterion, optimizer)
        hooks = traces(model, criterion)
        check_step(model, criterion, optimizer)
        assert traces(model, criterion) == hooks
        del optimizer
        gc.collect()
        assert traces(model, criterion) == before


LOADING = """
    import sys

    class Absent:
        def find_spec(self, name, *rest):
            if name.partition(".")[0] in ("irw_optim", "opacus"):
                raise ImportError(name)

    sys.meta_path.insert(0, Absent())
    import torch

    for path in sys.argv[1:]:
        model, criterion = torch.load(path, weights_only=False)
        criterion(model(torch.ones(2, 4).double()), torch.tensor([0, 1])).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert not any(name.startswith("irw_optim") for name in sys.modules)
    print("loaded")
"""


class WithState(nn.Linear):
    """Its class says what is saved."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": None}


class WithSlots(nn.Linear):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.extra = 7


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


COPYING = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: torch.load(saved(value), weights_only=False),
}


class TestWhatIsSavedIsTheModel:
    def layers(self) -> tuple[nn.Module, nn.Module]:
        layers = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
        return layers, nn.CrossEntropyLoss()

    def test_it_loads_where_this_package_is_not(self, tmp_path: Path):
        both = self.layers()
        optimizer = over(*both)
        x, y = torch.randn(B, 4).double(), torch.randint(2, (B,))
        both[1](both[0](x), y).backward()
        torch.save(both, tmp_path / "attached.pt")
        with open(tmp_path / "pickled.pt", "wb") as file:
            torch.save(pickle.loads(pickle.dumps(both)), file)
        paths = [str(tmp_path / "attached.pt"), str(tmp_path / "pickled.pt")]
        code = [sys.executable, "-c", textwrap.dedent(LOADING), *paths]
        done = subprocess.run(code, capture_output=True, text=True, check=False)
        assert done.stdout == "loaded\n", done.stderr
        assert optimizer.criterion is both[1]

    def test_it_asks_for_no_more_than_a_plain_one_with_weights_only(self):
        plain = get_unsafe_globals_in_checkpoint(saved(self.layers()))
        both = self.layers()
        optimizer = over(*both)
        assert get_unsafe_globals_in_checkpoint(saved(both)) == plain
        kinds = [type(m) for module in both for m in module.modules()]
        with torch.serialization.safe_globals([*kinds, set]):
            model, _ = torch.load(saved(both), weights_only=True)
        assert all(map(torch.equal, model.parameters(), both[0].parameters()))
        optimizer.detach()

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_no_trace_in_any_protocol(self, protocol):
        both = self.layers()
        expected = pickle.dumps(copy.deepcopy(both), protocol)
        optimizer = over(*both)
        found = pickle.dumps(both, protocol)
        assert b"irw_optim" not in found
        assert without_addresses(found) == without_addresses(expected)
        assert traces(*pickle.loads(found)) == traces(*self.layers())
        optimizer.detach()

    @pytest.mark.parametrize("how", [copy.copy, *COPYING.values()], ids=["copy", *COPYING])
    @pytest.mark.parametrize(
        "make_layer",
        [
            lambda: nn.Linear(4, 3),
            lambda: WithState(4, 3),
            WithSlots,
            lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3))),
        ],
        ids=["plain", "with a state of its own", "with slots", "with a reduction of its own"],
    )
    def test_copies_are_plain(self, make_layer, how):
        layer = make_layer()
        if how is copy.copy and isinstance(layer, torch.fx.GraphModule):
            pytest.skip("it shares its layers, and with them what is attached to them")
        expected = traces(how(layer))
        optimizer = over(layer, None)
        twin = how(layer)
        assert traces(twin) == expected
        assert getattr(twin, "extra", 7) == 7
        assert all(map(torch.equal, twin.parameters(), layer.parameters()))
        optimizer.detach()
        assert traces(how(layer)) == expected

    def test_a_class_that_copies_itself(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        expected = traces(copy.deepcopy(model))
        optimizer = over(model, None)
        twin = copy.deepcopy(model)
        assert traces(twin) == expected
        assert twin[0].parametrizations.weight[0] is not model[0].parametrizations.weight[0]
        assert not optimizer.last_step

    def test_hooks_of_others_stay_in_the_copy(self):
        model = make()
        model[2].register_forward_hook(_shift)
        optimizer = over(model, None)
        model[2].register_forward_hook(_shift)
        twin = copy.deepcopy(model)
        assert list(twin[2]._forward_hooks.values()) == [_shift, _shift]
        x = batch()[0]
        assert torch.equal(twin(x), model(x))
        optimizer.detach()
        assert torch.equal(twin(x), model(x))

    def test_a_forward_that_the_criterion_had_of_its_own_is_saved(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        criterion.forward = _zero
        optimizer = over(model, criterion)
        assert copy.copy(criterion).forward is _zero
        optimizer.detach()
        assert criterion.forward is _zero


def _shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def _zero(*args: Any) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize("how", COPYING.values(), ids=COPYING)
class TestCopiesOfAnOptimizer:
    def test_with_model_and_criterion(self, how):
        model, criterion = make(), nn.CrossEntropyLoss()
        before = traces(model, criterion)
        optimizer = over(model, criterion)
        check_step(model, criterion, optimizer)
        attached = traces(model, criterion)
        its_model, its_criterion, twin = how((model, criterion, optimizer))
        assert twin.criterion is its_criterion
        assert twin.model is its_model
        for _ in range(2):  # detached, and attached again
            assert traces(its_model, its_criterion) == attached
            check_step(its_model, its_criterion, twin)
            assert ghost_covers(twin)
            twin.detach()
            assert traces(its_model, its_criterion) == before
            twin = IRWOptimizer(twin.inner, alpha=ALPHA, model=its_model, criterion=its_criterion)
        assert traces(model, criterion) == attached
        check_step(model, criterion, optimizer)

    def test_alone(self, how):
        model, criterion = make(), nn.CrossEntropyLoss()
        optimizer = over(model, criterion)
        twin = how(optimizer)
        assert twin.model is not model
        check_step(twin.model, twin.criterion, twin)
        twin.detach()
        check_step(model, criterion, optimizer)

    def test_inside_its_model(self, how):
        twin = how(TrainsItself())
        assert twin.optimizer.model is twin
        for _ in range(2):
            check_step(twin, twin.criterion, twin.optimizer, twin.body)
        assert traces(twin.body) != traces(make())

    def test_of_two_over_one_model_the_newer_has_the_criterion(self, how):
        model, criterion = make(), nn.CrossEntropyLoss()
        older, newer = over(model, criterion), over(model, criterion)
        for order in ((older, newer), (newer, older)):
            copies = how((model, criterion, order))
            twins = dict(zip(order, copies[2], strict=True))
            assert twins[older].criterion is None
            assert twins[newer].criterion is copies[1]

    def test_in_the_middle_of_an_accumulation(self, how):
        model, criterion = make(), nn.CrossEntropyLoss()
        optimizer = over(model, criterion, accumulation_steps=2)
        x, y = batch()
        criterion(model(x), y).backward()
        its_model, its_criterion, twin = how((model, criterion, optimizer))
        with pytest.raises(RuntimeError, match="no gradient"):
            twin.step()
        for _ in range(2):
            its_criterion(its_model(x), y).backward()
        twin.step()
        assert twin.steps == 1

    @pytest.mark.parametrize("part", ["engine", "replicas"])
    def test_its_parts(self, how, part):
        model = make()
        owner = Engine(model, "ghost") if part == "engine" else Replicas(model)
        twin = how(owner)
        its_model = twin.model
        assert its_model is not model
        assert traces(its_model) != traces(make())
        (twin.remove_hooks if part == "engine" else twin.release)()
        assert traces(its_model) == traces(make())


def test_a_shallow_copy_shares_what_is_attached():
    model, criterion = make(), nn.CrossEntropyLoss()
    before = traces(model, criterion)
    optimizer = over(model, criterion)
    twin = copy.copy(optimizer)
    del optimizer
    gc.collect()
    check_step(model, criterion, twin)
    assert ghost_covers(twin)
    del twin
    gc.collect()
    assert traces(model, criterion) == before


class TestAConstructorThatFails:
    """While the exception is looked at, too, which holds everything that was there."""

    @pytest.mark.parametrize("where", ["hooks", "a pair", "processes", "criterion", "wrapper"])
    def test_leaves_everything_as_it_was(self, where, monkeypatch):
        model, criterion = make(), nn.CrossEntropyLoss()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        before, inner = traces(model, criterion), dict(vars(sgd))

        def fail(*args: Any, **options: Any) -> None:
            raise ZeroDivisionError

        def fail_on(kind: type[nn.Module]) -> Any:
            plain = compiling.Replaced
            return lambda module, *rest: (fail if isinstance(module, kind) else plain)(
                module, *rest
            )

        if where == "hooks":
            monkeypatch.setattr(compiling, "Replaced", fail_on(nn.LayerNorm))
            model.append(nn.LayerNorm(3).double())
            before = traces(model, criterion)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            inner = dict(vars(sgd))
        elif where == "a pair":
            monkeypatch.setattr(compiling, "Replaced", fail_on(Scaled))
        elif where == "processes":
            monkeypatch.setattr(weighted_backward, "is_sharded", fail)
        elif where == "criterion":
            monkeypatch.setattr(attached, "Replaced", fail)
        else:
            monkeypatch.setattr(irw_optimizer.OptimizerWrapper, "begin", fail)
        options = {"model": model, "criterion": criterion, "engine": "ghost"}
        with pytest.raises(ZeroDivisionError) as caught:
            IRWOptimizer(sgd, alpha=ALPHA, **options)
        assert caught.value.__traceback__ is not None
        assert traces(model, criterion) == before
        assert vars(sgd) == inner

    def test_and_leaves_an_older_optimizer_its_criterion(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        older = over(model, criterion)
        with pytest.raises(ValueError, match="alpha=2"):
            over(model, criterion, alpha=2.0)
        assert older.criterion is criterion
        check_step(model, criterion, older)


class TestScriptedModules:
    """They take no hooks: their parameters go through autograd, exactly."""

    @pytest.mark.parametrize("whole", [False, True], ids=["a part", "the whole"])
    @pytest.mark.parametrize("how", ["script", "trace"])
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_are_exact(self, how, whole):
        plain, example = make(), batch()[0]
        compiled = _compiled(how, plain if whole else plain[0], example)
        model = compiled if whole else nn.Sequential(compiled, plain[1], plain[2])
        criterion = nn.CrossEntropyLoss()
        before = traces(criterion), {k: len(v) for k, v in vars(plain[2]).items() if "hooks" in k}
        optimizer = over(model, criterion)
        for _ in range(3):
            check_step(model, criterion, optimizer)
        assert optimizer.engine.uses == 3  # what it knows of the model lasts
        optimizer.detach()
        hooks = {k: len(v) for k, v in vars(plain[2]).items() if "hooks" in k}
        assert (traces(criterion), hooks) == before


def _compiled(how: str, module: nn.Module, example: Tensor) -> nn.Module:
    if how == "script":
        return torch.jit.script(torch.jit.trace(module, example))
    return torch.jit.trace(module, example)
