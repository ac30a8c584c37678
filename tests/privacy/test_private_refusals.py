"""What would void the guarantee cannot be run by accident, and a refusal changes nothing."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from models import mlp
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from opacus.schedulers import ExponentialGradClip
from private_zoo import CLASSES, CONFIG, setting
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.privacy import DPGuaranteeError, IRWDPConfig, IRWDPOptimizer, IRWPrivacyEngine
from irw_optim.schemes import GlobalScheme, ResamplingSampler

N = 24


class Lookahead(Optimizer):
    """A wrapper of the kind that training libraries have: it is an optimizer, and holds one."""

    def __init__(self, inner):
        self.fast = inner
        super().__init__(inner.param_groups, {})


@pytest.fixture
def parts():
    """What goes into make_private, and a check afterwards that none of it has changed."""
    torch.manual_seed(0)
    model = mlp(4, 5, CLASSES, act=nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(N, 4), torch.randint(0, CLASSES, (N,)))
    return {
        "module": model,
        "optimizer": optimizer,
        "data_loader": DataLoader(data, batch_size=6),
        "criterion": nn.CrossEntropyLoss(),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "irw": CONFIG,
    }


def footprint(engine, parts):
    """Everything that make_private could have changed."""
    model, optimizer, criterion = parts["module"], parts["optimizer"], parts["criterion"]
    return (
        {k: v.clone().tolist() for k, v in model.state_dict().items()},
        [(len(m._forward_hooks), len(m._backward_hooks), sorted(vars(m))) for m in model.modules()],
        [sorted(vars(p)) for p in model.parameters()],
        copy.deepcopy(optimizer.state_dict()),
        sorted(vars(optimizer)),
        sorted(vars(criterion)) if criterion is not None else None,
        list(engine.accountant.history),
        engine.dataset,
    )


def assert_refused(error, match, parts, **changes):
    changed = {**parts, **changes}
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, changed)
    with pytest.raises(error, match=match):
        engine.make_private(**changed)
    assert footprint(engine, changed) == before


refused = functools.partial(assert_refused, DPGuaranteeError)
not_built = functools.partial(assert_refused, NotImplementedError)


def irw(parts, **options):
    return IRWOptimizer(parts["optimizer"], alpha=0.3, model=parts["module"], **options)


# The obvious combinations --------------------------------------------------------------------


def test_make_private_refuses_an_irw_optimizer(parts):
    refused("optimizer is an IRWOptimizer", parts, optimizer=irw(parts))


def test_make_private_refuses_an_irw_optimizer_inside_another(parts):
    refused("optimizer is an IRWOptimizer", parts, optimizer=Lookahead(irw(parts)))


def test_make_private_refuses_a_model_that_an_irw_optimizer_is_attached_to(parts):
    attached = irw(parts)
    refused("attached to the model.*detach", parts)
    attached.detach()
    IRWPrivacyEngine(accountant="rdp").make_private(**parts)


def test_make_private_refuses_a_criterion_that_an_irw_optimizer_is_attached_to(parts):
    attached = irw(parts, criterion=parts["criterion"], engine="autodiff")
    refused("attached to the.*detach", parts)
    attached.detach()
    IRWPrivacyEngine(accountant="rdp").make_private(**parts)


def test_opacus_own_engine_around_an_irw_optimizer_is_stopped_at_the_step(parts):
    """PrivacyEngine accepts it silently; the inner step would read gradients without noise."""
    model, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=parts["module"],
        optimizer=IRWOptimizer(parts["optimizer"], alpha=0.3),
        data_loader=parts["data_loader"],
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(iter(loader))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    losses.mean().backward()
    with pytest.raises(DPGuaranteeError):
        optimizer.step()
    with pytest.raises(DPGuaranteeError):
        optimizer.original_optimizer.step(losses=losses)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_an_irw_optimizer_refuses_a_private_optimizer(parts):
    _, optimizer, _ = IRWPrivacyEngine(accountant="rdp").make_private(**parts)
    with pytest.raises(DPGuaranteeError):
        IRWOptimizer(optimizer, alpha=0.3)


@pytest.mark.parametrize("wrapper", [lambda o: o, Lookahead])
@pytest.mark.parametrize("kind", [DPOptimizer, AdaClipDPOptimizer, IRWDPOptimizer])
def test_make_private_refuses_a_private_optimizer(parts, kind, wrapper):
    options = {
        IRWDPOptimizer: {"irw": CONFIG},
        AdaClipDPOptimizer: {
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 1.0,
            "min_clipbound": 0.1,
            "unclipped_num_std": 1.0,
        },
    }.get(kind, {})
    private = kind(
        parts["optimizer"],
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=6,
        **options,
    )
    refused(f"optimizer is a {kind.__name__}", parts, optimizer=wrapper(private))


@pytest.mark.parametrize("wrap", [lambda o: IRWOptimizer(o, alpha=0.3), Lookahead])
def test_the_optimizer_itself_refuses_the_same(parts, wrap):
    inner = wrap(parts["optimizer"])
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 6}
    if isinstance(inner, Lookahead):
        inner.fast = DPOptimizer(parts["optimizer"], **options)
    with pytest.raises(DPGuaranteeError, match="optimizer is a"):
        IRWDPOptimizer(inner, irw=CONFIG, **options)
    assert not any(hasattr(p, "grad_sample") for p in parts["module"].parameters())


# What looks at several samples ---------------------------------------------------------------


def test_filters_and_schemes_are_refused(parts):
    refused("^outliers=.*compares the samples", parts, outliers=DBSCANFilter())
    refused("^scheme=", parts, scheme="global")
    refused("^center=1.0", parts, center=1.0)
    refused("^class_balance=True", parts, class_balance=True)
    refused("^weighting=", parts, weighting=lambda losses: losses.softmax(0))
    with pytest.raises(DPGuaranteeError, match=r"^outliers="):
        IRWDPConfig(init_threshold=1.0, outliers=DBSCANFilter())
    with pytest.raises(DPGuaranteeError, match=r"^outliers="):
        IRWDPOptimizer(
            parts["optimizer"],
            irw=CONFIG,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=6,
            outliers=DBSCANFilter(),
        )


def test_the_global_scheme_is_refused(parts):
    data = parts["data_loader"].dataset
    sampler = ResamplingSampler(torch.ones(N) / N)
    refused(
        "ResamplingSampler.*global IRW weights",
        parts,
        data_loader=DataLoader(data, batch_size=6, sampler=sampler),
    )
    _, optimizer, loader = IRWPrivacyEngine(accountant="rdp").make_private(**parts)
    with pytest.raises(DPGuaranteeError):
        GlobalScheme(optimizer, loader)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(5), nn.SyncBatchNorm(5), nn.BatchNorm1d(5, affine=False)]
)
def test_batch_norm_is_refused(parts, norm):
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(f"1 is a {type(norm).__name__}", parts, module=model, optimizer=optimizer)


def test_frozen_batch_norm_in_training_mode_is_refused(parts):
    """Opacus looks at trainable modules only, but the batch statistics mix all the same."""
    norm = nn.BatchNorm1d(5).requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, CLASSES))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    assert PrivacyEngine(accountant="rdp").is_compatible(
        module=model, optimizer=optimizer, data_loader=parts["data_loader"]
    )
    refused("1 is a BatchNorm1d", parts, module=model, optimizer=optimizer)


def test_running_statistics_are_refused(parts):
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused("track_running_stats", parts, module=model, optimizer=optimizer)


# Sampling ------------------------------------------------------------------------------------


def test_sampling_that_is_not_poisson_is_refused(parts):
    refused("poisson_sampling=False", parts, poisson_sampling=False)
    refused("rand_on_empty=True", parts, rand_on_empty=True)
    data = parts["data_loader"].dataset
    weighted = WeightedRandomSampler(torch.ones(N), N)
    loaders = {
        "WeightedRandomSampler": DataLoader(data, batch_size=6, sampler=weighted),
        "SubsetRandomSampler": DataLoader(data, batch_size=6, sampler=SubsetRandomSampler([1, 2])),
        "list": DataLoader(data, batch_sampler=[[0, 1], [2, 3]]),
        "with replacement": DataLoader(
            data, batch_size=6, sampler=torch.utils.data.RandomSampler(data, replacement=True)
        ),
    }
    for name, loader in loaders.items():
        refused(name, parts, data_loader=loader)


@pytest.mark.parametrize("shuffle", [False, True])
def test_ordinary_loaders_and_private_ones_are_taken(parts, shuffle):
    parts["data_loader"] = DataLoader(parts["data_loader"].dataset, batch_size=6, shuffle=shuffle)
    *_, loader = IRWPrivacyEngine(accountant="rdp").make_private(**parts)
    assert loader.sample_rate == 0.25
    model = nn.Linear(4, CLASSES)
    *_, again = IRWPrivacyEngine(accountant="rdp").make_private(
        **{
            **parts,
            "module": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "data_loader": loader,
        }
    )
    assert again.sample_rate == 0.25


# Losses --------------------------------------------------------------------------------------


def unchanged(s, error, match, **step):
    before = [p.detach().clone() for p in s.optimizer.params]
    state = s.optimizer.public_state
    with pytest.raises(error, match=match):
        s.optimizer.step(**step)
    assert s.optimizer.public_state is state
    assert s.optimizer._logical_batch is None
    for p, old in zip(s.optimizer.params, before, strict=True):
        assert torch.equal(p, old)


def test_missing_losses_are_refused():
    s = setting("mlp")
    s.optimizer.pending.unfollow()
    s.backward()
    unchanged(s, DPGuaranteeError, "losses are missing")


@pytest.mark.parametrize(
    ("losses", "match"),
    [
        (torch.zeros(7), "losses has 7 samples but a parameter of shape .* has 8"),
        (torch.zeros(9), "losses has 9 samples"),
        (torch.zeros(0), "losses has 0 samples"),
        (torch.zeros(8, 1), r"losses has shape \(8, 1\)"),
        (torch.tensor(0.5), r"losses has shape \(\)"),
        (torch.zeros(8, dtype=torch.long), "dtype torch.int64"),
        ([0.0] * 8, r"losses=\[0.0"),
    ],
)
def test_losses_that_are_not_one_per_sample_are_refused(losses, match):
    s = setting("mlp")
    s.backward()
    unchanged(s, DPGuaranteeError, match, losses=losses)


def test_a_batch_dimension_that_the_model_folds_away_is_refused():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):  # one row for the whole batch: (1, 6, 4)
            return self.head((x[..., None] + self.embedding(torch.arange(6)[None])).mean(1))

    model = GradSampleModule(Position())
    optimizer = IRWDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        irw=CONFIG,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    losses = nn.functional.cross_entropy(
        model(torch.randn(8, 6)), torch.zeros(8).long(), reduction="none"
    )
    losses.mean().backward()
    with pytest.raises(DPGuaranteeError, match="has 1 per-sample gradients"):
        optimizer.step(losses=losses)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("how", ["mean", "functional"])
def test_per_sample_gradients_that_are_not_autograds_are_refused(parts, mode, how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            h = self.first(x)
            if how == "mean":  # the samples of a batch mix
                return self.second(h - h.mean(0))
            return self.second(h @ self.first.weight)  # a weight behind its layer's back

    model = Model()
    parts |= {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    private, optimizer, _ = IRWPrivacyEngine(accountant="rdp").make_private(
        **parts, grad_sample_mode=mode
    )
    before = [p.detach().clone() for p in model.parameters()]
    for rows in (1, 6):  # one sample alone has nobody to mix with
        optimizer.zero_grad()
        parts["criterion"](private(torch.randn(rows, 4)), torch.zeros(rows).long()).backward()
        if rows == 1:
            continue
        with pytest.raises(DPGuaranteeError, match="differ from autograd"):
            optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_samples_that_meet_in_a_later_batch_are_refused(parts):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)
            self.rows = torch.arange(6)

        def forward(self, x):
            return self.second(self.first(x)[self.rows])

    model = Model()
    parts |= {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    private, optimizer, _ = IRWPrivacyEngine(accountant="rdp").make_private(**parts)

    def step():
        optimizer.zero_grad()
        parts["criterion"](private(torch.randn(6, 4)), torch.zeros(6).long()).backward()
        optimizer.step()

    for _ in range(6):
        step()
    model.rows = torch.tensor([0, 1, 2, 1, 4, 5])  # two samples share a row from here on
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(DPGuaranteeError, match="differ from autograd"):
        step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_a_criterion_with_another_reduction_is_refused(parts):
    for reduction in ("sum", "none"):
        assert_refused(
            ValueError,
            "reduction",
            parts,
            criterion=nn.CrossEntropyLoss(reduction=reduction),
        )
    assert_refused(ValueError, "loss_reduction='sum'", parts, loss_reduction="sum")


def test_a_criterion_without_per_sample_losses_is_refused(parts):
    class Pairwise(nn.Module):
        def forward(self, output, y):
            return (output[:, None] - output[None]).square().mean()

    assert_refused(TypeError, "Pairwise has no reduction", parts, criterion=Pairwise())


# Gradient accumulation -----------------------------------------------------------------------


def test_gradient_accumulation_is_refused(parts):
    model, optimizer, _ = IRWPrivacyEngine(accountant="rdp").make_private(**parts)
    x, y = torch.randn(4, 4), torch.zeros(4).long()
    for _ in range(2):
        parts["criterion"](model(x), y).backward()
    with pytest.raises(DPGuaranteeError, match="2 backward passes"):
        optimizer.step()
    with pytest.raises(DPGuaranteeError, match="grad_sample holds 2 backward passes"):
        optimizer.step(losses=torch.zeros(8))
    optimizer.zero_grad()
    parts["criterion"](model(x), y).backward()
    optimizer.step()
    assert optimizer.public_state.steps == 1


def test_stepping_twice_on_the_same_gradients_is_refused():
    s = setting("mlp")
    s.backward()
    losses = s.optimizer.pending.losses()
    s.optimizer.step()
    with pytest.raises(DPGuaranteeError, match="losses are missing"):
        s.optimizer.step()
    with pytest.raises(DPGuaranteeError, match="stepped on already"):
        s.optimizer.step(losses=losses)


def test_stepping_without_a_backward_pass_is_refused():
    s = setting("mlp")
    unchanged(s, ValueError, "has no grad_sample: call backward", losses=torch.zeros(8))


def test_a_model_without_hooks_is_refused():
    model = nn.Linear(2, 2)
    optimizer = IRWDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        irw=CONFIG,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    with pytest.raises(ValueError, match=r"must go through IRWPrivacyEngine\.make_private"):
        optimizer.step(losses=torch.zeros(8))


def test_checkpoints_in_the_middle_of_a_logical_batch_are_refused(parts, tmp_path):
    engine = IRWPrivacyEngine(accountant="rdp")
    model, optimizer, _ = engine.make_private(**parts)
    saved = optimizer.state_dict()
    x, y = torch.randn(4, 4), torch.zeros(4).long()
    optimizer.signal_skip_step(True)
    parts["criterion"](model(x), y).backward()
    optimizer.step()
    with pytest.raises(DPGuaranteeError, match=r"state_dict\(\) in the middle of a logical batch"):
        optimizer.state_dict()
    with pytest.raises(DPGuaranteeError, match=r"load_state_dict\(\) in the middle"):
        optimizer.load_state_dict(saved)
    with pytest.raises(DPGuaranteeError, match="in the middle of a logical batch"):
        engine.save_checkpoint(path=tmp_path / "half", module=model, optimizer=optimizer)
    assert not (tmp_path / "half").exists()
    optimizer.zero_grad()
    parts["criterion"](model(x), y).backward()
    optimizer.step()
    assert optimizer.state_dict()["irw_dp"]["steps"] == 1


def test_another_clipping_norm_in_the_middle_of_a_logical_batch_is_refused(parts):
    """Those clipped before would be too long for the noise of the new one."""
    _, optimizer, _ = IRWPrivacyEngine(accountant="rdp").make_private(**parts)
    schedule = ExponentialGradClip(optimizer, gamma=0.1)
    x, y = torch.randn(4, 4), torch.zeros(4).long()
    for skip in (True, False):
        optimizer.signal_skip_step(skip)
        parts["criterion"](parts["module"](x), y).backward()
        optimizer.step()
        if skip:
            with pytest.raises(
                DPGuaranteeError, match=r"max_grad_norm=0\.1 in the middle of a log"
            ):
                schedule.step()
            assert optimizer.max_grad_norm == 1.0
        optimizer.zero_grad()
    schedule.step()
    assert optimizer.max_grad_norm == pytest.approx(0.1)


# Not built, misspelt, out of range -----------------------------------------------------------


def test_what_is_not_built_is_named(parts):
    not_built("clipping='per_layer'", parts, clipping="per_layer")
    not_built("clipping='adaptive'", parts, clipping="adaptive")
    not_built("per-layer clipping", parts, max_grad_norm=[1.0, 1.0, 1.0, 1.0])
    not_built("grad_sample_mode='ghost_fsdp'", parts, grad_sample_mode="ghost_fsdp")
    not_built("LBFGS", parts, optimizer=torch.optim.LBFGS(parts["module"].parameters()))


def test_closures_are_refused():
    s = setting("mlp")
    s.backward()
    unchanged(s, NotImplementedError, "closure", closure=lambda: 0.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"irw": None}, TypeError, "irw=None: expected an IRWDPConfig"),
        ({"criterion": nn.functional.mse_loss}, TypeError, "is no nn.Module"),
        ({"irw": {"alpha": 0.3}}, TypeError, "expected an IRWDPConfig"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier=nan"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier='1'"),
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm=0.0: expected a number in \(0, inf\)"),
        ({"max_grad_norm": math.inf}, ValueError, "max_grad_norm=inf"),
    ],
)
def test_values_out_of_range_are_named(parts, change, error, match):
    assert_refused(error, match, parts, **change)


def test_what_is_no_optimizer_is_named(parts):
    with pytest.raises(TypeError, match="expected a torch optimizer"):
        IRWPrivacyEngine(accountant="rdp").make_private(**{**parts, "optimizer": parts["module"]})


def test_misspelt_arguments_are_refused(parts):
    """Opacus swallows them, and a misspelt irw= would give plain DP-SGD."""
    assert_refused(
        TypeError, "'noise_multipler': did you mean noise_multiplier", parts, noise_multipler=2.0
    )
    config = parts.pop("irw")
    with pytest.raises(TypeError, match="irw"):
        IRWPrivacyEngine(accountant="rdp").make_private(**parts, iwr=config)
    with pytest.raises(TypeError, match="'expected_batchsize': did you mean expected_batch_size"):
        IRWDPOptimizer(
            parts["optimizer"],
            irw=config,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
            expected_batchsize=5,
        )


@pytest.mark.parametrize("size", [None, 0, -1, math.inf])
def test_an_unknown_batch_size_is_refused(parts, size):
    with pytest.raises((TypeError, ValueError), match="expected_batch_size="):
        IRWDPOptimizer(
            parts["optimizer"],
            irw=CONFIG,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=size,
        )


def test_a_target_epsilon_on_a_spent_budget_is_refused(parts):
    engine = IRWPrivacyEngine(accountant="rdp")
    engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    del parts["noise_multiplier"]
    with pytest.raises(DPGuaranteeError, match="accounted for steps already"):
        engine.make_private_with_epsilon(**parts, target_epsilon=1.0, target_delta=1e-5, epochs=1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("target_epsilon", [0, -1.0, math.nan, math.inf, None, True, "3"]),
        ("target_delta", [0, 1, 2, 1e6, math.nan, None]),
        ("epochs", [0, -1, 1.5, None, "2"]),
        ("epsilon_tolerance", [0, -1.0, 1e-9, math.nan, "x"]),
        ("data_loader", [3, None]),
    ],
)
def test_a_budget_out_of_range_is_named_before_the_search(parts, name, values):
    """It would give hardly any noise, or never end."""
    del parts["noise_multiplier"]
    parts |= {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 2}
    engine = IRWPrivacyEngine(accountant="rdp")
    before = footprint(engine, parts)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"{name}={value!r}: expected"):
            engine.make_private_with_epsilon(**{**parts, name: value})
    assert footprint(engine, parts) == before
    given = {"epochs": np.int64(2), "target_epsilon": np.float32(3.0)}
    assert engine.make_private_with_epsilon(**{**parts, **given})[1].noise_multiplier > 0


@pytest.mark.parametrize("delta", [0, 1, 2.0, -1e-5, math.nan, None, "1e-5"])
def test_an_impossible_delta_has_no_epsilon(delta):
    engine = IRWPrivacyEngine(accountant="rdp")
    engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises((TypeError, ValueError), match=f"delta={delta!r}: expected"):
        engine.get_epsilon(delta=delta)
    assert engine.get_epsilon(delta=1e-5) > 0


def test_opacus_is_not_imported_for_the_error_alone():
    import subprocess
    import sys

    code = "import sys, irw_optim.arguments, irw_optim.privacy;print('opacus' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
