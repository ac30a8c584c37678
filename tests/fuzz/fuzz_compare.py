"""One case against a loop of plain autograd over the samples, link by link.

Losses, S, scores, weights and ``p.grad`` follow from each other, so each is compared with what the
loop makes of the link before. Errors are relative to the length of the vectors that a number is
made of: a score is an inner product, and may cancel to anything.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import reference
import torch
from fuzz_cases import Case
from fuzz_losses import Losses, expected
from fuzz_models import TOKENS
from hypothesis import reject
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer

EXACT = {torch.float64: 1e-7, torch.float32: 3e-3}
SCORED = {"all": None, "last": "last", "matrices": lambda name, p: p.ndim > 1}


def compare(case: Case) -> str:
    """Every step of the case equals the loop.

    Returns:
        "exact", or "refused" where ``engine="ghost"`` said that it does not cover the model.
    """
    model = make_model(case)
    twin = copy.deepcopy(model)
    criterion = case.task.build(case.model.classes, case.dtype)
    its_criterion = copy.deepcopy(criterion)
    filter_ = None if case.filtered == "no" else Filter(case.filtered)
    owned = list((model.head if case.head_alone else model).parameters())
    optimizer = IRWOptimizer(
        torch.optim.SGD(owned, lr=0.05 / case.factor),
        alpha=case.alpha,
        model=model,
        criterion=criterion if case.way == "criterion" else None,
        outliers=filter_,
        score_parameters=SCORED[case.scored],
        engine=case.engine,
        **case.options,
    )
    for number, sizes in enumerate(case.steps):
        seeds = range(case.seed + 100 * number, case.seed + 100 * number + 10 * len(sizes), 10)
        batches = [make_batch(case, *both) for both in zip(sizes, seeds, strict=True)]
        twin.load_state_dict(model.state_dict())
        try:
            truths = [plain(case, twin, its_criterion, batch) for batch in batches]
        except (RuntimeError, ValueError, IndexError):
            reject()  # plain torch does not train it either

        model.zero_grad()
        optimizer.zero_grad()
        try:
            for batch, truth in zip(batches, truths, strict=True):
                backward(case, optimizer, model, criterion, batch, truth)
        except RuntimeError as refusal:
            if case.engine == "ghost" and str(refusal).startswith('engine="ghost"'):
                return "refused"
            raise
        Step(case, optimizer, model, truths, filter_).check(number)
        for (name, ours), its in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert reference.error(ours, its) < EXACT[case.dtype], name
        optimizer.step()
        if not all(p.isfinite().all() for p in model.parameters()):
            break  # it diverged, as it may
    optimizer.detach()
    return "exact"


# The two sides -----------------------------------------------------------------------------------


class Filter:
    """An outlier filter that notes what it was given."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.gram = torch.empty(0)

    def __call__(self, gram: Tensor) -> Tensor:
        self.gram = gram
        if self.kind == "dbscan":
            return DBSCANFilter(min_samples=2, quantile=0.7)(gram)
        return gram.diagonal() > 4 * gram.diagonal().median()


class Batch(NamedTuple):
    """What one backward pass reads."""

    inputs: Tensor
    seed: int

    def output(self, case: Case, model: nn.Module) -> Tensor:
        torch.manual_seed(self.seed)  # the same dropout masks
        return case.task.prepared(model(self.inputs.clone()))

    def target(self, case: Case, criterion: nn.Module, output: Tensor) -> Tensor:
        torch.manual_seed(self.seed + 1)
        return case.task.targets(output.detach(), criterion)


class Truth(NamedTuple):
    """What plain autograd says of one backward pass: losses, their gradients, other terms'."""

    batch: Losses
    G: Tensor
    extra: Tensor


def make_model(case: Case) -> nn.Module:
    """Parameters from the case's seed; some frozen, the head's never."""
    torch.manual_seed(case.seed)
    model = case.model.build().to(case.dtype)
    parameters, head = list(model.parameters()), set(model.head.parameters())
    for number in case.frozen:
        p = parameters[number % len(parameters)]
        p.requires_grad_(p in head)
    return model


def make_batch(case: Case, size: tuple[int, int], seed: int) -> Batch:
    (B, T), d, kind = size, case.model.width, case.model.kind
    torch.manual_seed(seed)
    if kind == "tokens":
        return Batch(torch.randint(TOKENS, (B, T)), seed)
    side = 3 + T % 2
    shape = {"vector": (d,), "sequence": (T, d)}.get(kind) or (d, *[side] * int(kind[-1]))
    return Batch(torch.randn(B, *shape, dtype=case.dtype), seed)


def other_term(output: Tensor) -> Tensor:
    """A penalty that a user adds to the loss; its gradient is an ordinary one."""
    return 0.1 * output.square().sum()


def plain(case: Case, twin: nn.Module, criterion: nn.Module, batch: Batch) -> Truth:
    """The loop over the samples."""
    parameters = [p for p in twin.parameters() if p.requires_grad]
    output = batch.output(case, twin)
    losses = expected(criterion, output, batch.target(case, criterion, output))
    whole = losses.losses.sum()  # a backward pass that raises must do so for empty batches too
    torch.autograd.grad(whole, parameters, retain_graph=True, allow_unused=True)
    G = reference.per_sample_gradients(losses.losses, parameters)
    extra = torch.zeros(G.shape[1])
    if case.extra_term:
        extra = reference.per_sample_gradients(other_term(output)[None], parameters)[0]
    return Truth(losses._replace(losses=losses.losses.detach()), G.double(), extra.double())


def backward(case, optimizer, model, criterion, batch: Batch, truth: Truth) -> None:
    """One backward pass as a user writes it; the value of the loss is torch's own."""
    output = batch.output(case, model)
    target = batch.target(case, criterion, output)
    if case.way == "losses":
        losses = expected(criterion, output, target)
        if case.extra_term:
            other_term(output).backward(retain_graph=True)
        labels = losses.labels if case.options["class_balance"] else None
        optimizer.backward(losses.losses * case.factor, labels=labels)
        return
    loss = criterion(output, target)
    torch.testing.assert_close(loss.detach(), truth.batch.value, equal_nan=True)
    total = case.factor * loss
    if case.extra_term:
        total = total + other_term(output)
    total.backward()


# The comparison ----------------------------------------------------------------------------------


class Step:
    """What one step, of one backward pass or of several, must have done."""

    def __init__(
        self,
        case: Case,
        optimizer: IRWOptimizer,
        model: nn.Module,
        truths: Sequence[Truth],
        filter_: Filter | None,
    ) -> None:
        self.case, self.options, self.model = case, case.options, model
        self.record = optimizer.last_step
        self.tolerance = EXACT[case.dtype]
        self.trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.owned = {p for group in optimizer.param_groups for p in group["params"]}
        self.truths, self.filter = truths, filter_
        own = case.way == "losses"  # these carry the factor, and every sample counts
        self.loss_factor = case.factor if own else 1.0
        self.scales = [case.factor * (1.0 if own else truth.batch.scale) for truth in truths]
        self.counts = [
            torch.ones_like(truth.batch.counts) if own else truth.batch.counts for truth in truths
        ]
        self.G = torch.cat([truth.G for truth in truths])

    def check(self, number: int) -> None:
        if number < self.options["warmup_steps"]:
            shares = [counts.double() / counts.sum().clamp(min=1) for counts in self.counts]
            pairs = zip(self.scales, shares, strict=True)
            self.check_gradient(torch.cat([scale * share for scale, share in pairs]))
            return
        losses = torch.cat([truth.batch.losses for truth in self.truths]) * self.loss_factor
        assert reference.error(self.record.losses, losses) < self.tolerance
        weights = self.record.weights.double()
        assert weights.shape == losses.shape
        if len(weights):
            self.check_outliers()
            self.check_decision()
            assert float(weights.min()) >= 0, weights
            assert abs(float(weights.sum()) - 1) < 1e-5, weights
        self.check_gradient(sum(self.scales) * weights)

    def check_outliers(self) -> None:
        """The filter saw G G^T of the samples that are not ignored."""
        if self.filter is not None:
            rows = self.scored[self.present] * self.loss_factor
            unit = float(rows.square().sum(1).max())
            self.close("gram", self.filter.gram, rows @ rows.T, unit)

    def check_decision(self) -> None:
        """S, the scores and the weights, as the rule is written down in `reference`."""
        rows, center = self.scored * self.loss_factor, self.options["center"]
        if self.options["weighting"] != "irw":  # rows of one number: everybody's is 1 ...
            rows = torch.ones_like(rows[:, :1])
            if self.options["weighting"] == "cvar":  # ... or that of the worst-off
                rows = self.decide(rows, 0.0).worst_off.double()[:, None]
        truth = self.decide(rows, center)
        both = self.record.worst_off.tolist(), truth.worst_off.tolist()
        assert both[0] == both[1], ("S", both)

        lengths = rows.norm(dim=1)
        unit = float(lengths.max() * lengths[truth.worst_off].sum()) * (1 + center)
        if self.options["weighting"] == "irw":
            self.close("scores", self.record.scores, truth.scores, unit)
        # The division by a mass that cancellation left small is as exact as that mass.
        mass = self.smallest_mass(truth)
        blown_up = len(rows) * unit / mass if mass else float("inf")
        if blown_up * self.tolerance < 0.1:
            self.close("weights", self.record.weights, truth.weights, blown_up)

    def decide(self, rows: Tensor, center: float) -> reference.Decision:
        """From our own losses, which are equal but for rounding: so ties break alike."""
        return reference.decide(
            self.record.losses,
            rows,
            self.case.alpha,
            removed=self.removed,
            center=center,
            labels=self.labels,
            mix=self.options["mix"],
        )

    def check_gradient(self, coefficients: Tensor) -> None:
        """``p.grad`` is the sum of c_i g_i, and what other terms of the loss add."""
        extra = sum(truth.extra for truth in self.truths)
        unit = float((coefficients[:, None] * self.G).norm(dim=1).sum() + extra.norm())
        expected_gradient = coefficients @ self.G + extra
        parts = expected_gradient.split([p.numel() for _, p in self.trainable])
        for (name, p), part in zip(self.trainable, parts, strict=True):
            ours = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            self.close(f"{name}.grad", ours.flatten(), part, unit)

    def close(self, what: str, ours: Tensor, expected: Tensor, unit: float) -> None:
        assert ours.shape == expected.shape, (what, ours.shape, expected.shape)
        error = float((ours.detach().double() - expected).abs().max()) if ours.numel() else 0.0
        assert error <= self.tolerance * unit, (what, error, unit)

    @cached_property
    def scored(self) -> Tensor:
        """The columns of G that make the scores."""
        last, named = "", {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if p.requires_grad:  # a tied one is chosen by any of its names
                last = name.rpartition(".")[0]
                named.setdefault(p, set()).add(last)
        chosen = {
            "all": lambda name, p: True,
            "last": lambda name, p: last in named[p],
            "matrices": SCORED["matrices"],
        }[self.case.scored]
        columns = [
            torch.full((p.numel(),), p in self.owned and chosen(name, p))
            for name, p in self.trainable
        ]
        return self.G[:, torch.cat(columns)]

    @cached_property
    def present(self) -> Tensor:
        """The samples that are not ignored; all of them, where that is nobody."""
        counts = torch.cat(self.counts)
        return counts > 0 if bool((counts > 0).any()) else torch.ones_like(counts) > 0

    @property
    def removed(self) -> set[int]:
        gone = ~self.present | self.record.outliers
        return set(gone.nonzero().flatten().tolist())

    @property
    def labels(self) -> list[int] | None:
        if not self.options["class_balance"]:
            return None
        return torch.cat([truth.batch.labels for truth in self.truths]).tolist()

    def smallest_mass(self, truth: reference.Decision) -> float:
        """Of the positive scores; with classes, of any class."""
        labels = self.labels or [0] * len(truth.scores)
        masses: dict[int, float] = {}
        for i, score in enumerate(truth.scores.clamp(min=0).tolist()):
            if i not in self.removed:
                masses[labels[i]] = masses.get(labels[i], 0.0) + score
        return min(masses.values(), default=0.0)
