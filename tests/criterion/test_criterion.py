"""Per-sample losses against a loop over the samples and against torch's own reductions."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim.criterion import (
    PerSampleLoss,
    PerSampleLosses,
    per_sample_losses,
    validate_criterion,
)
from irw_optim.criterion._rules import RULES

B, C, T = 4, 3, 5
DOUBLE = torch.float64


class Case(NamedTuple):
    """A criterion by reduction, and its arguments; the first is the model's output."""

    make: Callable[[str], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    batch_dim: int = 0
    reductions: tuple[str, ...] = ("mean", "sum")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=DOUBLE) * 0.8 + 0.1


def log_probabilities(*shape: int) -> Tensor:
    return normal(*shape).log_softmax(1)


def classes(*shape: int) -> Tensor:
    return torch.randint(C, shape)


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape, dtype=DOUBLE) * 2 - 1


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=DOUBLE)
SHAPES = [(B,), (B, 1), (B, T), (B, C, 2, 2)]
CLASS_SHAPES = [(B, C), (B, C, 1), (B, C, T), (B, C, 2, 2)]


def without_classes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:])


CASES: dict[str, Case] = {}

for shape in SHAPES:
    several = {
        "L1Loss": (lambda r: nn.L1Loss(reduction=r), normal),
        "MSELoss": (lambda r: nn.MSELoss(reduction=r), normal),
        "HuberLoss": (lambda r: nn.HuberLoss(reduction=r, delta=0.7), normal),
        "SmoothL1Loss": (lambda r: nn.SmoothL1Loss(reduction=r, beta=0.7), normal),
        "PoissonNLLLoss": (lambda r: nn.PoissonNLLLoss(reduction=r, full=True), positive),
        "SoftMarginLoss": (lambda r: nn.SoftMarginLoss(reduction=r), signs),
        "HingeEmbeddingLoss": (lambda r: nn.HingeEmbeddingLoss(reduction=r), signs),
        "BCEWithLogitsLoss": (lambda r: nn.BCEWithLogitsLoss(reduction=r), positive),
    }
    for name, (make, target) in several.items():
        CASES[f"{name}-{shape}"] = Case(
            make, lambda shape=shape, target=target: (normal(*shape), target(*shape))
        )
    CASES[f"BCELoss-{shape}"] = Case(
        lambda r: nn.BCELoss(reduction=r),
        lambda shape=shape: (positive(*shape), positive(*shape)),
    )
    CASES[f"GaussianNLLLoss-{shape}"] = Case(
        lambda r: nn.GaussianNLLLoss(reduction=r, full=True),
        lambda shape=shape: (normal(*shape), normal(*shape), positive(*shape)),
    )
    CASES[f"MarginRankingLoss-{shape}"] = Case(
        lambda r: nn.MarginRankingLoss(margin=0.3, reduction=r),
        lambda shape=shape: (normal(*shape), normal(*shape), signs(*shape)),
    )
    CASES[f"PerSampleLoss-{shape}"] = Case(
        lambda r: PerSampleLoss(lambda a, b: (a - b).abs() ** 1.5, r),
        lambda shape=shape: (normal(*shape), normal(*shape)),
    )
    CASES[f"KLDivLoss-{shape}"] = Case(
        lambda r: nn.KLDivLoss(reduction=r),
        lambda shape=shape: (normal(*shape), positive(*shape)),
        reductions=("mean", "sum", "batchmean"),
    )

for shape in CLASS_SHAPES:
    for label, options in {
        "plain": {},
        "weight": {"weight": CLASS_WEIGHTS},
        "smooth": {"label_smoothing": 0.1},
        "weight-smooth": {"weight": CLASS_WEIGHTS, "label_smoothing": 0.1},
    }.items():
        CASES[f"CrossEntropyLoss-{label}-{shape}"] = Case(
            lambda r, o=options: nn.CrossEntropyLoss(reduction=r, **o),
            lambda shape=shape: (normal(*shape), classes(*without_classes(shape))),
        )
        CASES[f"CrossEntropyLoss-soft-{label}-{shape}"] = Case(
            lambda r, o=options: nn.CrossEntropyLoss(reduction=r, **o),
            lambda shape=shape: (normal(*shape), normal(*shape).softmax(1)),
        )
    for label, weight in {"plain": None, "weight": CLASS_WEIGHTS}.items():
        CASES[f"NLLLoss-{label}-{shape}"] = Case(
            lambda r, w=weight: nn.NLLLoss(w, reduction=r),
            lambda shape=shape: (log_probabilities(*shape), classes(*without_classes(shape))),
        )

for p in (1, 2):
    for label, weight in {"plain": None, "weight": CLASS_WEIGHTS}.items():
        CASES[f"MultiMarginLoss-{p}-{label}"] = Case(
            lambda r, p=p, w=weight: nn.MultiMarginLoss(p=p, weight=w, reduction=r),
            lambda: (normal(B, C), classes(B)),
        )

CASES |= {
    "BCELoss-weight": Case(
        lambda r: nn.BCELoss(positive(T), reduction=r), lambda: (positive(B, T), positive(B, T))
    ),
    "BCEWithLogitsLoss-weight-pos_weight": Case(
        lambda r: nn.BCEWithLogitsLoss(CLASS_WEIGHTS, pos_weight=2 * CLASS_WEIGHTS, reduction=r),
        lambda: (normal(B, C), positive(B, C)),
    ),
    "KLDivLoss-log_target": Case(
        lambda r: nn.KLDivLoss(reduction=r, log_target=True),
        lambda: (log_probabilities(B, C, T), log_probabilities(B, C, T)),
        reductions=("mean", "sum", "batchmean"),
    ),
    "MultiLabelMarginLoss": Case(
        lambda r: nn.MultiLabelMarginLoss(reduction=r),
        lambda: (normal(B, C), torch.tensor([[0, -1, 0], [1, 2, -1], [2, 0, 1], [1, -1, 1]])),
    ),
    "MultiLabelSoftMarginLoss": Case(
        lambda r: nn.MultiLabelSoftMarginLoss(weight=CLASS_WEIGHTS, reduction=r),
        lambda: (normal(B, C), signs(B, C).clamp(min=0)),
    ),
    "MultiLabelSoftMarginLoss-sequence": Case(
        lambda r: nn.MultiLabelSoftMarginLoss(reduction=r),
        lambda: (normal(B, T, C), signs(B, T, C).clamp(min=0)),
    ),
    "CosineEmbeddingLoss": Case(
        lambda r: nn.CosineEmbeddingLoss(margin=0.1, reduction=r),
        lambda: (normal(B, T), normal(B, T), signs(B)),
    ),
    "TripletMarginLoss": Case(
        lambda r: nn.TripletMarginLoss(swap=True, reduction=r),
        lambda: (normal(B, T), normal(B, T), normal(B, T)),
    ),
    "TripletMarginLoss-sequence": Case(
        lambda r: nn.TripletMarginLoss(reduction=r),
        lambda: (normal(B, T, 2), normal(B, T, 2), normal(B, T, 2)),
    ),
    "TripletMarginWithDistanceLoss": Case(
        lambda r: nn.TripletMarginWithDistanceLoss(
            distance_function=lambda a, b: (a - b).abs().sum(-1), reduction=r
        ),
        lambda: (normal(B, T), normal(B, T), normal(B, T)),
    ),
    "CTCLoss": Case(
        lambda r: nn.CTCLoss(reduction=r),
        lambda: (
            normal(9, B, C).log_softmax(2),
            torch.randint(1, C, (B, 2)),
            torch.tensor([9, 8, 9, 7]),
            torch.full((B,), 2),
        ),
        batch_dim=1,
    ),
}

if hasattr(nn, "LinearCrossEntropyLoss"):

    def linear_cross_entropy(reduction: str, **options: Any) -> nn.Module:
        torch.manual_seed(5)
        return nn.LinearCrossEntropyLoss(T, C, reduction=reduction, dtype=DOUBLE, **options)

    CASES |= {
        "LinearCrossEntropyLoss": Case(linear_cross_entropy, lambda: (normal(B, T), classes(B))),
        "LinearCrossEntropyLoss-chunked": Case(
            lambda r: linear_cross_entropy(
                r, weight=CLASS_WEIGHTS, options=nn.LinearCrossEntropyOptions()
            ),
            lambda: (normal(B, T), classes(B)),
        ),
        "LinearCrossEntropyLoss-outputs": Case(
            lambda r: linear_cross_entropy(r, weight=CLASS_WEIGHTS, out_features=(2,)),
            lambda: (normal(B, T), classes(B, 2)),
        ),
        "LinearCrossEntropyLoss-soft": Case(
            linear_cross_entropy, lambda: (normal(B, T), normal(B, C).softmax(1))
        ),
    }

CASES_BY_REDUCTION = [
    pytest.param(case, reduction, id=f"{name}-{reduction}")
    for name, case in CASES.items()
    for reduction in case.reductions
]
# KLDivLoss' own warning about its mean, from the reference calls.
every_loss = pytest.mark.parametrize(("case", "reduction"), CASES_BY_REDUCTION)
kl_mean_warns = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")


def arguments(case: Case) -> tuple[Any, ...]:
    torch.manual_seed(11)
    output, *others = case.args()
    return output.requires_grad_(), *others


def criterion_of(case: Case, reduction: str) -> Any:
    torch.manual_seed(7)
    return case.make(reduction)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def ordinary(batch: PerSampleLosses) -> Tensor:
    """The value by the identity of the module's docstring: n-weighted mean of ℓ, times scale."""
    counts = torch.ones_like(batch.losses) if batch.counts is None else batch.counts
    return batch.scale * (counts * batch.losses).sum() / counts.sum()


@every_loss
def test_losses_are_those_of_a_loop_over_the_samples(case: Case, reduction: str) -> None:
    args = arguments(case)
    losses = per_sample_losses(criterion_of(case, reduction), *args).losses
    assert losses.shape == (B,)
    unreduced = criterion_of(case, "mean")
    unreduced.reduction = "none"
    for i in range(B):
        output, *others = args
        one = unreduced(
            output.narrow(case.batch_dim, i, 1), *(other[i : i + 1] for other in others)
        )
        divisor = args[-1][i] if isinstance(unreduced, nn.CTCLoss) else 1
        close(losses[i], one.mean() / divisor)


@every_loss
@kl_mean_warns
def test_value_and_gradient_are_the_ordinary_ones(case: Case, reduction: str) -> None:
    args = arguments(case)
    criterion = criterion_of(case, reduction)
    expected = criterion(*args)
    batch = per_sample_losses(criterion, *args)
    close(batch.value, expected.detach())
    assert batch.value.dtype == expected.dtype
    assert batch.value.shape == ()
    assert not batch.value.requires_grad
    assert not isinstance(batch.scale, Tensor) or not batch.scale.requires_grad
    averaged = batch.scale * batch.losses.mean()
    close(averaged, expected)
    close(gradient(averaged, args[0]), gradient(criterion(*args), args[0]))


@every_loss
def test_nothing_else_of_the_criterion_changes(case: Case, reduction: str) -> None:
    criterion = criterion_of(case, reduction)
    before, state = dict(vars(criterion)), deepcopy(criterion.state_dict())
    per_sample_losses(criterion, *arguments(case))
    assert vars(criterion) == before
    assert criterion.reduction == reduction
    for key, value in criterion.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", nn.modules.loss.__all__)
def test_every_loss_of_torch_has_a_rule_and_a_case(name: str) -> None:
    kind = getattr(nn.modules.loss, name)
    assert any(issubclass(kind, known) for known in RULES)
    if kind in RULES:  # NLLLoss2d is NLLLoss under an old name
        assert any(case.startswith(name) for case in CASES)


SCALES = {
    "plain mean": (nn.MSELoss(), (B, T), 1),
    "sum counts the elements": (nn.MSELoss(reduction="sum"), (B, T), B * T),
    "batchmean counts those of a sample": (nn.KLDivLoss(reduction="batchmean"), (B, T), T),
}


@pytest.mark.parametrize(("criterion", "shape", "scale"), list(SCALES.values()), ids=list(SCALES))
def test_scale(criterion: nn.Module, shape: tuple[int, ...], scale: float) -> None:
    assert per_sample_losses(criterion, normal(*shape), positive(*shape)).scale == scale


def test_scale_of_class_weights_is_their_inverse_mean() -> None:
    target = torch.tensor([0, 1, 2, 2])
    batch = per_sample_losses(nn.CrossEntropyLoss(CLASS_WEIGHTS), normal(B, C), target)
    close(torch.as_tensor(batch.scale), B / CLASS_WEIGHTS[target].sum())


# --- elements that are not valid ---------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 4),
    trailing=st.lists(st.integers(1, 3), max_size=2),
    ignore_index=st.sampled_from([-100, 0, 2, 7]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    nll=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 10**6),
)
def test_ignored_elements(
    batch: int,
    trailing: list[int],
    ignore_index: int,
    weighted: bool,
    smoothing: float,
    nll: bool,
    reduction: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = CLASS_WEIGHTS if weighted else None
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index}
    if nll:
        kind: type[nn.Module] = nn.NLLLoss
    else:
        kind, options = nn.CrossEntropyLoss, options | {"label_smoothing": smoothing}
    logits = torch.randn(batch, C, *trailing, dtype=DOUBLE, generator=generator, requires_grad=True)
    target = torch.randint(C, (batch, *trailing), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.4] = ignore_index
    criterion: Any = kind(reduction=reduction, **options)
    result = per_sample_losses(criterion, logits, target)

    elements = kind(reduction="none", **options)(logits, target)
    valid = target != ignore_index
    for i in range(batch):
        own = elements[i][valid[i]]
        close(result.losses[i], own.mean() if own.numel() else torch.zeros((), dtype=DOUBLE))
        if not own.numel():
            assert not gradient(result.losses[i], logits).any()
    if result.counts is None:
        assert valid.all()
    else:
        assert result.counts.tolist() == valid.reshape(batch, -1).sum(1).tolist()

    expected = criterion(logits, target)
    torch.testing.assert_close(result.value, expected.detach(), equal_nan=True)
    if valid.any():
        close(ordinary(result), expected)
        close(gradient(ordinary(result), logits), gradient(expected, logits))
    else:
        assert torch.as_tensor(result.scale).isfinite()
        assert not gradient(result.scale * result.losses.sum(), logits).any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [tuple, torch.tensor])
@pytest.mark.parametrize("sizes", [[3, 1, 2, 0], [1, 1, 3, 2]])
def test_ctc_of_unequal_lengths(reduction: str, kind: Any, sizes: list[int]) -> None:
    lengths = kind(sizes)
    torch.manual_seed(3)
    output = normal(9, B, C).log_softmax(2).requires_grad_()
    rest = (torch.randint(1, C, (B, 3)), kind([9, 9, 8, 9]), lengths)
    criterion = nn.CTCLoss(reduction=reduction)
    result = per_sample_losses(criterion, output, *rest)
    each = nn.CTCLoss(reduction="none")(output, *rest)
    close(result.losses, each / torch.as_tensor(lengths).clamp(min=1))
    close(result.value, criterion(output, *rest).detach())
    close(ordinary(result), criterion(output, *rest))
    close(gradient(ordinary(result), output), gradient(criterion(output, *rest), output))


def test_ctc_infinities_are_zeroed_as_asked() -> None:
    criterion = nn.CTCLoss(zero_infinity=True)
    output = normal(1, 2, C).log_softmax(2)
    args = (output, torch.tensor([[1, 1], [1, 0]]), torch.tensor([1, 1]), torch.tensor([2, 1]))
    result = per_sample_losses(criterion, *args)
    assert result.losses[0] == 0
    close(result.value, criterion(*args))


# --- shapes -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    per_sample=st.integers(0, 3),
    width=st.integers(0, 3),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_flattened_samples_fold_row_major(
    batch: int, per_sample: int, width: int, reduction: str
) -> None:
    criterion = nn.MSELoss(reduction=reduction)
    output, target = normal(batch * per_sample, width), normal(batch * per_sample, width)
    result = per_sample_losses(criterion, output, target, batch_size=batch)
    shape = (batch, per_sample, width)
    folded = per_sample_losses(criterion, output.reshape(shape), target.reshape(shape))
    assert result.losses.shape == (batch,)
    torch.testing.assert_close(result.losses, folded.losses)
    torch.testing.assert_close(result.value, criterion(output, target), equal_nan=True)


def test_flattened_tokens_fold_by_their_own_valid_counts() -> None:
    logits = normal(2 * 3, C)
    target = torch.tensor([0, 1, -100, 2, -100, -100])
    result = per_sample_losses(nn.CrossEntropyLoss(), logits, target, batch_size=2)
    tokens = F.cross_entropy(logits, target, reduction="none")
    close(result.losses, torch.stack([tokens[:2].mean(), tokens[3]]))
    assert result.counts is not None
    assert result.counts.tolist() == [2, 1]
    assert result.labels is None


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum"), nn.KLDivLoss()]
)
@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3), (3, 0), (1,), (1, 1)])
@kl_mean_warns
def test_empty_and_single(criterion: nn.Module, shape: tuple[int, ...]) -> None:
    output, target = normal(*shape).requires_grad_(), positive(*shape)
    result = per_sample_losses(criterion, output, target)
    assert result.losses.shape == shape[:1]
    assert result.losses.isfinite().all()
    torch.testing.assert_close(result.value, criterion(output, target).detach(), equal_nan=True)
    result.losses.sum().backward()


def test_empty_batch_of_classes() -> None:
    result = per_sample_losses(nn.CrossEntropyLoss(), normal(0, C, T), classes(0, T))
    assert result.losses.shape == (0,)
    assert result.value.isnan()  # as torch has it


# --- labels -------------------------------------------------------------------------------------

LABELS = {
    "class indices": (nn.CrossEntropyLoss(), (normal(B, C), [0, 2, 1, 2]), [0, 2, 1, 2]),
    "class indices with ignored": (nn.CrossEntropyLoss(), (normal(B, C), [0, -100, 1, 2]), None),
    "one index a row": (nn.NLLLoss(), (normal(B, C, 1), [[0], [2], [1], [2]]), [0, 2, 1, 2]),
    "multi margin": (nn.MultiMarginLoss(), (normal(B, C), [0, 2, 1, 2]), [0, 2, 1, 2]),
    "binary": (nn.BCEWithLogitsLoss(), (normal(B), [0.0, 1.0, 1.0, 0.0]), [0, 1, 1, 0]),
    "binary column": (nn.BCELoss(), (positive(B, 1), [[0.0], [1.0], [1.0], [0.0]]), [0, 1, 1, 0]),
    "smoothed binary": (nn.BCEWithLogitsLoss(), (normal(B), [0.1, 0.9, 0.9, 0.1]), [0, 1, 1, 0]),
    "signs": (nn.SoftMarginLoss(), (normal(B), [-1.0, 1.0, 1.0, -1.0]), [0, 1, 1, 0]),
}


@pytest.mark.parametrize(("criterion", "args", "labels"), list(LABELS.values()), ids=list(LABELS))
def test_labels(criterion: nn.Module, args: tuple[Tensor, Any], labels: list[int] | None) -> None:
    output, target = args[0], torch.tensor(args[1])
    if target.is_floating_point():
        target = target.to(DOUBLE)
    result = per_sample_losses(criterion, output, target)
    assert result.labels is not None
    assert result.labels.dtype == torch.int64
    assert result.labels.tolist() == (target.tolist() if labels is None else labels)


NO_LABELS = {
    "an index per element": (nn.CrossEntropyLoss(), (normal(B, C, T), classes(B, T))),
    "probabilities": (nn.CrossEntropyLoss(), (normal(B, C), normal(B, C).softmax(1))),
    "several binary": (nn.BCEWithLogitsLoss(), (normal(B, T), positive(B, T))),
    "regression": (nn.MSELoss(), (normal(B), normal(B))),
    "any function": (PerSampleLoss(lambda a, b: a - b), (normal(B), normal(B))),
}


@pytest.mark.parametrize(("criterion", "args"), list(NO_LABELS.values()), ids=list(NO_LABELS))
def test_no_labels(criterion: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    assert per_sample_losses(criterion, *args).labels is None


# --- number formats and devices -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(B, C), (B, C, T)])
@pytest.mark.parametrize("weighted", [False, True])
def test_dtypes(dtype: torch.dtype, reduction: str, shape: tuple[int, ...], weighted: bool) -> None:
    torch.manual_seed(0)
    weight = CLASS_WEIGHTS.to(dtype) if weighted else None
    criterion = nn.CrossEntropyLoss(weight, reduction=reduction)
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = classes(*without_classes(shape))
    result = per_sample_losses(criterion, logits, target)
    assert result.losses.dtype == result.value.dtype == dtype
    assert logits.requires_grad
    tolerance = 4 * torch.finfo(dtype).eps
    expected = criterion(logits, target).detach()
    torch.testing.assert_close(result.value, expected, rtol=tolerance, atol=tolerance)
    rescaled = result.scale * result.losses.double().mean().detach()
    torch.testing.assert_close(rescaled, expected.double(), rtol=tolerance, atol=0)


def test_half_precision_means_survive_where_their_sums_overflow() -> None:
    logits = torch.tensor([[0.0, 60000.0]], dtype=torch.float16).unsqueeze(2).expand(1, 2, 5)
    target = torch.zeros(1, 5, dtype=torch.long)
    result = per_sample_losses(nn.CrossEntropyLoss(), logits, target)
    assert result.losses.tolist() == [60000.0]
    assert result.value == 60000


def test_autocast_computes_what_the_criterion_would() -> None:
    layer, inputs, target = nn.Linear(T, C), torch.randn(B, T), classes(B)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        logits = layer(inputs)
        expected = nn.CrossEntropyLoss()(logits, target)
        result = per_sample_losses(nn.CrossEntropyLoss(), logits, target)
    assert logits.dtype == torch.bfloat16
    assert result.losses.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(result.value, expected.detach())


ON_META = {
    "classes": (nn.CrossEntropyLoss(), (B, C), (B,)),
    "weighted": (nn.CrossEntropyLoss(torch.empty(C, device="meta")), (B, C, T), (B, T)),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), (B, C, T), (B, T)),
    "binary": (nn.BCEWithLogitsLoss(), (B,), None),
    "regression": (nn.MSELoss(), (B, T), None),
}


@pytest.mark.parametrize(
    ("criterion", "shape", "target_shape"), list(ON_META.values()), ids=list(ON_META)
)
def test_never_waits_for_the_device(
    criterion: nn.Module, shape: tuple[int, ...], target_shape: tuple[int, ...] | None
) -> None:
    # Meta tensors have no numbers, so whatever had to read one would raise.
    output = torch.empty(shape, device="meta", requires_grad=True)
    target = torch.empty(target_shape or shape, device="meta")
    result = per_sample_losses(criterion, output, target.long() if target_shape else target)
    assert result.losses.shape == (B,)


# --- how the criterion is called ----------------------------------------------------------------


def test_arguments_by_keyword() -> None:
    logits, target = normal(B, C), classes(B)
    by_name = per_sample_losses(nn.CrossEntropyLoss(CLASS_WEIGHTS), target=target, input=logits)
    by_place = per_sample_losses(nn.CrossEntropyLoss(CLASS_WEIGHTS), logits, target)
    assert torch.equal(by_name.losses, by_place.losses)
    assert by_name.scale == by_place.scale


def test_hooks_of_the_criterion_do_not_run_again() -> None:
    criterion = nn.MSELoss()
    calls = []
    criterion.register_forward_pre_hook(lambda *_: calls.append("before"))
    criterion.register_forward_hook(lambda *_: calls.append("after"))
    per_sample_losses(criterion, normal(B), normal(B))
    assert calls == []


@pytest.mark.cpu("a default device calls the function once more")
def test_the_loss_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda *a, **k: calls.append(k["reduction"]) or cross_entropy(*a, **k)
    )
    per_sample_losses(nn.CrossEntropyLoss(), normal(B, C), classes(B))
    assert calls == ["none"]


class OwnLoss(nn.Module):
    """What users write: honours its reduction."""

    def __init__(self, reduction: str = "mean", penalty: float = 0.0, bias: float = 0.0) -> None:
        super().__init__()
        self.reduction, self.penalty, self.bias = reduction, penalty, bias
        self.calls: list[str] = []

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls.append(self.reduction)
        losses = (output - target) ** 4 + self.bias
        if self.reduction == "none":
            return losses
        reduced = losses.mean() if self.reduction == "mean" else losses.sum()
        return reduced + self.penalty


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_own_module_with_a_reduction(reduction: str, shape: tuple[int, ...]) -> None:
    output, target = normal(*shape).requires_grad_(), normal(*shape)
    criterion = OwnLoss(reduction)
    result = per_sample_losses(criterion, output, target)
    close(result.losses, ((output - target) ** 4).reshape(B, -1).mean(1))
    close(result.scale * result.losses.mean(), criterion(output, target))


def test_own_module_sees_one_call_a_batch() -> None:
    criterion = OwnLoss()
    for _ in range(3):
        per_sample_losses(criterion, normal(B), normal(B))
    assert criterion.calls == ["none", "none", "none"]


class Memory:
    """An average of the losses so far, kept in many ways; the next losses are set against it."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(())
        self.parts: dict[str, Any] = {"list": [torch.zeros(())], "array": np.zeros(1)}
        self.parts["no numbers"] = [np.ndarray, self.tensor.untyped_storage()]
        self.other = SimpleNamespace(calls=0, generator=torch.Generator().manual_seed(0))

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        losses = (output - target).square()
        mean = losses.detach().mean()
        self.tensor.mul_(0.9).add_(mean)
        self.parts["list"][0] = self.parts["list"][0] * 0.9 + mean
        self.parts["array"][0] += float(mean)
        self.other.calls += 1
        drawn = torch.rand((), generator=self.other.generator)
        level = self.tensor + self.parts["list"][0] + float(self.parts["array"][0])
        return losses * (1 + level + drawn)


class KeepsAMemory(nn.Module):
    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = self.memory.losses(output, target)
        return losses if self.reduction == "none" else losses.mean()


def closing_over(memory: Memory) -> nn.Module:
    return PerSampleLoss(lambda output, target: memory.losses(output, target))


WITH_MEMORY: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Memory]]] = {
    "a module": (KeepsAMemory, lambda c: c.memory),
    "a method": (lambda: PerSampleLoss(Memory().losses), lambda c: c.function.__self__),
    "a function": (
        lambda: closing_over(Memory()),
        lambda c: c.function.__closure__[0].cell_contents,
    ),
    "a partial function": (
        lambda: PerSampleLoss(partial(Memory.losses, Memory())),
        lambda c: c.function.args[0],
    ),
}


@pytest.mark.parametrize("kind", WITH_MEMORY)
def test_what_a_loss_function_keeps_sees_one_call_a_batch(kind: str) -> None:
    make, memory_of = WITH_MEMORY[kind]
    torch.manual_seed(0)
    criterion, alone = make(), Memory()
    for _ in range(5):  # at uses 1, 2, 4 samples change places
        output, target = normal(B), normal(B)
        close(per_sample_losses(criterion, output, target).losses, alone.losses(output, target))
    assert memory_of(criterion).other.calls == alone.other.calls == 5
    assert memory_of(criterion).parts["array"] == alone.parts["array"]


HOLDING: dict[str, Callable[[Tensor, Tensor], tuple[Callable[..., Tensor], tuple[Any, ...]]]] = {
    "an object": lambda x, y: (
        lambda batch: (batch.x - batch.y).square(),
        (SimpleNamespace(x=x, y=y),),
    ),
    "a distribution": lambda x, y: (
        lambda law, target: -law.log_prob(target),
        (torch.distributions.Normal(x, 1.0), y),
    ),
    "nothing": lambda x, y: (lambda: (x - y).square(), ()),
    "an array of indices": lambda x, y: (
        lambda some: (x[some] - y[some]).square(),
        (np.arange(B),),
    ),
}


@pytest.mark.parametrize("kind", HOLDING)
def test_arguments_that_show_no_samples_are_taken(kind: str) -> None:
    x, y = normal(B).requires_grad_(), normal(B)
    function, arguments = HOLDING[kind](x, y)
    close(per_sample_losses(PerSampleLoss(function), *arguments).losses, function(*arguments))


class MaskedMean(nn.Module):
    """Its mean is that of its elements only as long as nothing is masked."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        losses = (output - target) ** 2 * mask
        return losses if self.reduction == "none" else losses.sum() / mask.sum()


def test_own_module_is_compared_with_its_own_value_at_every_batch() -> None:
    criterion, mask = MaskedMean(), torch.ones(B, T)
    output, target = normal(B, T).requires_grad_(), normal(B, T)
    for _ in range(5):
        result = per_sample_losses(criterion, output, target, mask)
        assert torch.equal(result.value, criterion(output, target, mask).detach())
    mask[0, 2:] = 0
    with pytest.raises(ValueError, match=r"MaskedMean.*its reduction is one of its own"):
        per_sample_losses(criterion, output, target, mask)


def test_own_value_that_is_not_finite_beside_losses_that_are_is_refused() -> None:
    with pytest.raises(ValueError, match="returned nan"):  # nothing is left of the mask
        per_sample_losses(MaskedMean(), normal(B), normal(B), torch.zeros(B))


class Drawn(nn.Module):
    """Draws, counts and keeps a running value, as a loss with label noise would."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.reduction, self.source, self.calls = "mean", source, 0
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("running", torch.ones(()))
        self.running: Tensor

    def noise(self, size: int) -> Tensor:
        if self.source == "torch":
            return torch.rand(size)
        if self.source == "generator":
            return torch.rand(size, generator=self.generator)
        if self.source == "random":
            return torch.tensor([random.random() for _ in range(size)])
        if self.source == "numpy":
            return torch.from_numpy(np.random.rand(size))
        return torch.tensor([secrets.randbelow(1000) / 1000 for _ in range(size)])

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        losses = (output - target) ** 2 * self.noise(len(output)) / self.running
        self.running.mul_(0.9).add_(0.1 * losses.detach().mean())
        return losses if self.reduction == "none" else losses.mean()


MIXING_NUMPY = pytest.mark.cpu("its criterion mixes what NumPy draws with the device")


@pytest.mark.parametrize(
    "source",
    ["torch", "generator", "random", pytest.param("numpy", marks=MIXING_NUMPY), "secrets"],
)
def test_own_module_that_draws_numbers_draws_them_once(source: str) -> None:
    once, twin = Drawn(source), Drawn(source)
    output, target = normal(B).requires_grad_(), normal(B)
    for seed in range(4):
        results = []
        for criterion, losses_of in ((once, per_sample_losses), (twin, lambda c, *a: c(*a))):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            results.append(losses_of(criterion, output, target))  # type: ignore[operator]
            results.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
        (batch, left), (value, right) = results[:2], results[2:]
        close(batch.losses.mean(), batch.value)
        assert left == right
        if source != "secrets":  # which nobody can draw again
            assert torch.equal(batch.value, value)
            assert torch.equal(once.running, twin.running)
        assert once.calls == twin.calls


@MIXING_NUMPY
def test_own_module_that_starts_to_draw_from_numpy_is_not_refused() -> None:
    criterion, late = Drawn("numpy"), Drawn("torch")
    output, target = normal(B).requires_grad_(), normal(B)
    for step in range(12):
        late.source = "torch" if step < 4 else "numpy"
        for c in (criterion, late):
            batch = per_sample_losses(c, output, target)
            close(batch.losses.mean(), batch.value)


def test_own_module_that_differentiates_twice_on_its_way() -> None:
    class Residual(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, points: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(output.sum(), points, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
            losses = (bend - output) ** 2
            return losses if self.reduction == "none" else losses.mean()

    points = normal(B).requires_grad_()
    result = per_sample_losses(Residual(), (3 * points).sin(), points)
    close(result.losses, (10 * (3 * points).sin()) ** 2)


def test_own_module_leaves_alone_what_an_earlier_graph_needs() -> None:
    criterion = MaskedMean()
    criterion.register_buffer("unused", torch.ones(2))
    output = normal(B).requires_grad_()
    first = per_sample_losses(criterion, output, normal(B), torch.ones(B)).losses.sum()
    needed = (criterion.unused * output[:2]).sum()
    per_sample_losses(criterion, output, normal(B), torch.ones(B))
    (first + needed).backward()
    assert output.grad is not None


def test_own_forward_on_a_loss_of_torch_is_not_taken_for_torch_s() -> None:
    criterion = nn.MSELoss()

    def forward(output: Tensor, target: Tensor) -> Tensor:
        losses = (output - target).abs()
        return losses if criterion.reduction == "none" else losses.mean() + 1

    criterion.forward = forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its reduction is one of its own"):
        per_sample_losses(criterion, normal(B), normal(B))


# --- rows that are no samples -------------------------------------------------------------------


def dice(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """One loss a class, over the whole batch: logits and targets of shape (N, C, ...)."""
    probabilities, dims = logits.softmax(1), (0, *range(2, logits.dim()))
    overlap, size = (probabilities * target).sum(dims), (probabilities + target).sum(dims)
    losses = 1 - (2 * overlap + 1) / (size + 1)
    return losses if weight is None else losses * weight


class BatchDice(nn.Module):
    reduction = "mean"

    def forward(self, *args: Tensor) -> Tensor:
        losses = dice(*args)
        return losses if self.reduction == "none" else losses.mean()


def squares_by_class(logits: Tensor, target: Tensor) -> Tensor:
    return (logits - target).square().flatten(2).mean(2).sum(0)


REDUCED_OVER_THE_BATCH = {
    "function": PerSampleLoss(dice),
    "module": BatchDice(),
    "sums": PerSampleLoss(squares_by_class),
    "in a dict": PerSampleLoss(lambda batch: dice(batch["logits"], batch["target"])),
}


@pytest.mark.parametrize("name", REDUCED_OVER_THE_BATCH)
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_are_not_taken_for_as_many_samples(
    name: str, size: int, dtype: torch.dtype
) -> None:
    logits = normal(size, size, 4, 4).to(dtype).requires_grad_()
    target = F.one_hot(torch.arange(size * 16).view(size, 4, 4) % size).movedim(-1, 1).to(dtype)
    args: tuple[Any, ...] = (logits, target)
    if name == "in a dict":
        args = ({"logits": logits, "target": target},)
    criterion = deepcopy(REDUCED_OVER_THE_BATCH[name])
    with pytest.raises(ValueError, match=r"not one loss per sample.*PerSampleLoss.*backward"):
        per_sample_losses(criterion, *args)


@pytest.mark.parametrize("classes_", [B, B + 2])
def test_weights_of_the_classes_are_no_samples(classes_: int) -> None:
    logits = normal(B, classes_, 4).requires_grad_()
    target = F.one_hot(torch.arange(B * 4).view(B, 4) % classes_, classes_).movedim(-1, 1)
    with pytest.raises(ValueError, match="PerSampleLoss returned losses of shape"):
        per_sample_losses(PerSampleLoss(dice), logits, target.double(), positive(classes_))


def test_rows_are_looked_at_again_now_and_then() -> None:
    criterion = PerSampleLoss(lambda x, over_batch: dice(x, x) if over_batch else x.mean((1, 2)))
    logits = normal(B, B, 3).requires_grad_()
    for _ in range(3):
        per_sample_losses(criterion, logits, False)
    with pytest.raises(ValueError, match="not one loss per sample"):
        per_sample_losses(criterion, logits, True)


def weighted_by_class(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight=weight, reduction="none")


def in_batch_negatives(left: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(left @ right.T, torch.arange(len(left)), reduction="none")


def matched(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    pairs = zip(outputs["logits"], targets, strict=True)
    return torch.stack([(x - t["value"]).square().mean() for x, t in pairs])


PER_SAMPLE = {
    "as many classes": (weighted_by_class, (normal(B, B), classes(B) % B, positive(B))),
    "weights of samples": (lambda x, w: x.square().sum(1) * w, (normal(B, B), positive(B))),
    "equal losses": (lambda x, w: (x * 0 + 1).sum(1) * w, (normal(B, C), positive(B))),
    "all equal": (lambda x: (x * 0 + 1).sum(1), (normal(B, B),)),
    "others of the batch": (in_batch_negatives, (normal(B, C), normal(B, C))),
    "drawn": (lambda x: (x * torch.rand_like(x)).sum(1), (normal(B, B),)),
    "a size of its own": (lambda x: x.flatten().view(B, -1).mean(1), (normal(B, B),)),
    "not finite": (lambda x: x.sum(1) / 0, (normal(B, B),)),
    "infinite by turns": (
        lambda x: x.sum(1) / 0,
        (torch.tensor([(-1.0) ** i for i in range(B)])[:, None],),
    ),
    "lists of samples": (
        matched,
        ({"logits": normal(B, C)}, [{"value": normal(C)} for _ in range(B)]),
    ),
    "lists of scales": (lambda xs: xs[0].sum(1) + xs[1].sum(1), ([normal(2, C), normal(2, C)],)),
    "two samples": (weighted_by_class, (normal(2, 2), classes(2) % 2, positive(2))),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_losses_of_samples_are_never_taken_for_classes(name: str) -> None:
    function, args = PER_SAMPLE[name]
    args = tuple(
        a.clone().requires_grad_() if a is args[0] and isinstance(a, Tensor) else a for a in args
    )
    criterion = PerSampleLoss(function)
    for _ in range(4):
        torch.manual_seed(0)
        expected = function(*args)
        torch.manual_seed(0)
        result = per_sample_losses(criterion, *args)
        torch.testing.assert_close(result.losses, expected, equal_nan=True)


def test_own_module_is_verified_later_if_the_first_batch_overflows() -> None:
    criterion = OwnLoss(penalty=1.0)
    assert per_sample_losses(criterion, normal(B) + float("inf"), normal(B)).value.isinf()
    with pytest.raises(ValueError, match="its reduction is one of its own"):
        per_sample_losses(criterion, normal(B), normal(B))


def test_own_module_whose_losses_cancel_is_not_refused() -> None:
    output = torch.tensor([1.0, 0.0], requires_grad=True)
    criterion = OwnLoss(bias=-0.5)
    # Off by what rounding does to numbers of size 1/2, beside a mean of 0.
    criterion.penalty = 1e-7
    assert per_sample_losses(criterion, output, torch.zeros(2)).value == 1e-7


def test_own_module_with_the_reduction_on_its_class() -> None:
    class Constant(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.l1_loss(output, target, reduction=self.reduction)

    criterion = Constant()
    assert per_sample_losses(criterion, normal(B), normal(B)).losses.shape == (B,)
    assert "reduction" not in vars(criterion)


def test_subclass_with_its_own_forward_is_not_taken_for_its_parent() -> None:
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            losses = F.cross_entropy(input, target, reduction="none")
            losses = losses * (1 - (-losses).exp()) ** 2
            return losses if self.reduction == "none" else losses.mean()

    class Named(nn.CrossEntropyLoss):
        pass

    logits, target = normal(B, C), classes(B)
    result = per_sample_losses(Focal(CLASS_WEIGHTS), logits, target)
    close(result.value, Focal()(logits, target))
    assert result.scale == 1.0
    named = per_sample_losses(Named(CLASS_WEIGHTS), logits, target)
    close(named.value, nn.CrossEntropyLoss(CLASS_WEIGHTS)(logits, target))
    assert named.scale != 1.0


def test_per_sample_loss_keeps_what_its_function_owns() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output * self.temperature, target, reduction="none")

    criterion = PerSampleLoss(Learned(), reduction="sum")
    assert [name for name, _ in criterion.named_parameters()] == ["function.temperature"]
    logits, target = normal(B, C), classes(B)
    close(criterion(logits, target), F.cross_entropy(logits, target, reduction="sum"))
    assert "Learned" in repr(criterion)


def test_per_sample_loss_that_flattens_tokens() -> None:
    def token_losses(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")

    logits, target = normal(B, T, C), classes(B, T)
    result = per_sample_losses(PerSampleLoss(token_losses), logits, target, batch_size=B)
    close(result.losses, token_losses(logits, target).reshape(B, T).mean(1))


def test_per_sample_loss_of_arguments_that_are_no_tensors() -> None:
    criterion = PerSampleLoss(lambda batch: batch["output"].square())
    output = normal(B, T)
    close(per_sample_losses(criterion, {"output": output}).losses, output.square().mean(1))


# --- refusals -----------------------------------------------------------------------------------


class Sum(nn.Module):
    """A weighted sum of criteria, without a reduction of its own."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + 0.1 * F.l1_loss(output, target)


class Deaf(Sum):
    """Has a reduction and does not listen to it."""

    reduction = "mean"


def compiled() -> nn.Module:
    return torch.compile(nn.MSELoss(), backend="eager")


IMPOSSIBLE = {
    "function": (lambda: F.mse_loss, TypeError, "function mse_loss.*no nn.Module.*PerSampleLoss"),
    "lambda": (lambda: lambda a, b: a, TypeError, r"lambda.*optimizer\.backward\(losses\)"),
    "class": (lambda: nn.MSELoss, TypeError, "MSELoss.*an instance, not a class"),
    "none": (lambda: None, TypeError, "criterion=None is no nn.Module"),
    "unreduced": (
        lambda: nn.CrossEntropyLoss(reduction="none"),
        ValueError,
        r"CrossEntropyLoss has reduction='none'.*reduction='mean'.*optimizer\.backward\(losses\)",
    ),
    "misspelt": (
        lambda: nn.MSELoss(reduction="average"),
        ValueError,
        "MSELoss has reduction='average'; known are mean, sum",
    ),
    "another's": (
        lambda: nn.MSELoss(reduction="batchmean"),
        ValueError,
        "MSELoss has reduction='batchmean'; known are mean, sum",
    ),
    "sequential": (
        lambda: nn.Sequential(nn.MSELoss()),
        TypeError,
        r"Sequential has no reduction.*PerSampleLoss\(fn\).*optimizer\.backward\(losses\)",
    ),
    "sum of criteria": (Sum, TypeError, r"Sum has no reduction.*PerSampleLoss\(fn\)"),
    "compiled": (compiled, TypeError, "OptimizedModule is compiled"),
}


@pytest.mark.parametrize(
    ("make", "error", "message"), list(IMPOSSIBLE.values()), ids=list(IMPOSSIBLE)
)
def test_impossible_criteria_are_refused_before_any_call(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    criterion = make()
    with pytest.raises(error, match=message):
        validate_criterion(criterion)
    with pytest.raises(error, match=message):
        per_sample_losses(criterion, normal(B), normal(B))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_criterion_is_refused() -> None:
    with pytest.raises(TypeError, match="RecursiveScriptModule is compiled"):
        validate_criterion(torch.jit.script(nn.MSELoss()))


@every_loss
def test_possible_criteria_pass(case: Case, reduction: str) -> None:
    validate_criterion(criterion_of(case, reduction))


def scalar(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


REFUSED_CALLS = {
    "unbatched": (
        nn.CTCLoss(),
        (normal(9, C), torch.ones(2).long(), torch.tensor(9), torch.tensor(2)),
        {},
        "without a batch dimension",
    ),
    "fold": (nn.MSELoss(), (normal(B), normal(B)), {"batch_size": 3}, "batch_size=3 must divide"),
    "no fold": (nn.MSELoss(), (normal(B), normal(B)), {"batch_size": -1}, "batch_size=-1 must"),
    "zero": (nn.MSELoss(), (normal(B), normal(B)), {"batch_size": 0}, "batch_size=0 must"),
    "ctc fold": (
        nn.CTCLoss(),
        (normal(9, B, C), torch.ones(B, 2, dtype=torch.long), (9,) * B, (2,) * B),
        {"batch_size": 2},
        "batch_size=2 must be 4: CTCLoss",
    ),
    "deaf": (Deaf(), (normal(B), normal(B)), {}, "Deaf returned a single number.*honour"),
    "penalty": (OwnLoss(penalty=0.1), (normal(B), normal(B)), {}, "OwnLoss.*mean.*one of its own"),
    "reduced": (PerSampleLoss(scalar), (normal(B), normal(B)), {}, "must not reduce"),
    "reduced by keyword": (PerSampleLoss(scalar), (), {"a": normal(B), "b": normal(B)}, "not red"),
    "flattened": (
        PerSampleLoss(lambda a, b: (a - b).flatten()),
        (normal(B, T), normal(B, T)),
        {},
        r"losses of shape \(20,\), but its arguments have leading dimensions \[4\]",
    ),
    "flattened by keyword": (
        PerSampleLoss(lambda a, b: (a - b).flatten()),
        (),
        {"a": normal(B, T), "b": normal(B, T)},
        r"losses of shape \(20,\), but its arguments have leading dimensions \[4\]",
    ),
}


@pytest.mark.parametrize(
    ("criterion", "args", "kwargs", "message"),
    list(REFUSED_CALLS.values()),
    ids=list(REFUSED_CALLS),
)
def test_refused_calls_leave_the_criterion_as_it_was(
    criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    before = dict(vars(criterion))
    with pytest.raises(ValueError, match=message):
        per_sample_losses(criterion, *args, **kwargs)
    assert vars(criterion) == before


def test_own_module_that_always_returns_losses_is_refused() -> None:
    criterion = OwnLoss()
    criterion.forward = lambda output, target: output - target  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its reduction is one of its own"):
        per_sample_losses(criterion, normal(B), normal(B))


@pytest.mark.parametrize("result", [3.0, torch.ones(B, dtype=torch.long)])
def test_losses_must_be_floating_point(result: Any) -> None:
    criterion = PerSampleLoss(lambda *_: result)
    with pytest.raises(TypeError, match=r"floating-point tensor of one loss per sample.*got "):
        per_sample_losses(criterion, normal(B), normal(B))
    with pytest.raises(TypeError, match=r"floating-point tensor of one loss per sample.*got "):
        criterion(normal(B), normal(B))


def test_criterion_is_restored_after_an_error_of_its_own() -> None:
    criterion = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(IndexError):
        per_sample_losses(criterion, normal(B, C), classes(B) + C)
    assert criterion.reduction == "sum"


@pytest.mark.parametrize("reduction", ["none", "average"])
def test_per_sample_loss_refuses_other_reductions(reduction: str) -> None:
    with pytest.raises(ValueError, match=f"reduction='{reduction}' must be 'mean' or 'sum'"):
        PerSampleLoss(scalar, reduction)


def test_per_sample_loss_refuses_what_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="function=3: expected a function"):
        PerSampleLoss(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"function=<class .*MSELoss'>: expected a function"):
        PerSampleLoss(nn.MSELoss)


def test_own_module_whose_reduction_is_a_property_that_hands_it_on():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.CrossEntropyLoss(), nn.MultiMarginLoss()

        @property
        def reduction(self) -> str:
            return self.first.reduction

        @reduction.setter
        def reduction(self, value: str) -> None:
            self.first.reduction = self.second.reduction = value

        def forward(self, output, target):
            return self.first(output, target) + self.second(output, target)

    criterion, logits, target = Both(), torch.randn(5, 3), torch.randint(3, (5,))
    found = per_sample_losses(criterion, logits, target)
    single = [criterion(row[None], one[None]) for row, one in zip(logits, target, strict=True)]
    torch.testing.assert_close(found.losses, torch.stack(single))
    assert criterion.reduction == criterion.second.reduction == "mean"
    criterion.reduction = "sum"
    assert per_sample_losses(criterion, logits, target).scale == 5


class OnModel(nn.Module):
    """Runs the model itself: one that it holds, or one that it is called with."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.reduction = model, "mean"
        self.register_buffer("expanded", torch.ones(1).expand(3))

    def forward(self, x, y, model=None):
        losses = F.cross_entropy((self.model or model)(x), y, reduction="none")
        return losses if self.reduction == "none" else losses.mean()


@pytest.mark.parametrize("how", ["holds it", "is called with it", "a function"])
def test_a_model_that_a_criterion_runs_sees_one_forward_a_batch(how):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))

    model, twin = network(), network()
    criterion: nn.Module = OnModel(model if how == "holds it" else None)
    if how == "a function":
        function = partial(F.cross_entropy, reduction="none")
        criterion = PerSampleLoss(lambda x, y: function(model(x), y))
    kwargs = {"model": model} if how == "is called with it" else {}
    torch.manual_seed(1)
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(5)]
    for seed, (x, y) in enumerate(batches):
        torch.manual_seed(seed)
        twin(x)
        torch.manual_seed(seed)
        per_sample_losses(criterion, x, y, **kwargs)
        for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(found, expected)


def test_small_whole_numbers_are_compared_with_what_is_ignored_as_they_are():
    """156 is what -100 wraps to in uint8."""
    logits, target = torch.randn(4, 200), torch.tensor([156, 3, 156, 199], dtype=torch.uint8)
    found = per_sample_losses(nn.CrossEntropyLoss(), logits, target)
    assert found.counts is None or bool(found.counts.all())
    torch.testing.assert_close(found.value, F.cross_entropy(logits, target.long()))


def test_own_module_that_knows_no_reduction_none_is_refused_with_its_words():
    class Strict(nn.Module):
        reduction = "mean"

        def forward(self, output, target):
            if self.reduction != "mean":
                raise ValueError(f"got {self.reduction}")
            return (output - target).abs().mean()

    with pytest.raises(TypeError, match="Strict with reduction='none' raised ValueError: got none"):
        per_sample_losses(Strict(), torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(RuntimeError, match="size"):  # its own error, with its own reduction
        per_sample_losses(Strict(), torch.randn(3, 2), torch.randn(3, 4))


def test_memory_that_runs_out_is_no_fault_of_the_criterion():
    class Large(nn.Module):
        reduction = "mean"

        def forward(self, output, target):
            if self.reduction == "none":
                raise torch.OutOfMemoryError("no memory for the elements")
            return (output - target).abs().mean()

    with pytest.raises(torch.OutOfMemoryError, match="no memory for the elements"):
        per_sample_losses(Large(), torch.randn(3, 2), torch.randn(3, 2))
