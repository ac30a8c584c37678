"""The two premises of the privacy proof, on real models through real backward passes.

Locality: what a sample contributes does not depend on the other samples of the batch.
Contribution: in units of the noise that is really drawn, nobody contributes more than 1/sigma.
"""

import math
from dataclasses import replace

import pytest
import torch
from opacus.optimizers import optimizer as opacus_optimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from private_zoo import CONFIG, ZOO, aim, setting
from torch.utils.data import DataLoader, TensorDataset

from irw_optim.privacy import optimizer as private_optimizer

TERMS = ("clip", "tail", "saturated", "weights", "counted")


def terms_of(s, rows):
    s.backward(rows)
    losses = s.optimizer.pending.losses()
    return s.optimizer._weigh(losses, s.optimizer.pending.rows(s.optimizer.params, len(losses)))


def assert_same_terms(terms, expected, rows):
    for name in TERMS:
        torch.testing.assert_close(
            getattr(terms, name), getattr(expected, name)[rows], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("kind", ZOO)
def test_removing_a_sample_leaves_the_others_terms_unchanged(kind):
    s = setting(kind, max_grad_norm=0.7)
    aim(s)
    whole = terms_of(s, slice(None))
    n = len(s.x)
    # The state must really split the batch, or there would be nothing to see.
    assert 0 < whole.tail.sum() < n
    assert 0 < whole.saturated.sum() < n
    assert whole.weights.unique().numel() > 2
    for removed in range(n):
        rows = [i for i in range(n) if i != removed]
        assert_same_terms(terms_of(s, rows), whole, rows)


@pytest.mark.parametrize("kind", ZOO)
def test_locality_through_physical_batches(kind, monkeypatch):
    s = setting(kind, max_grad_norm=0.7)
    aim(s)
    n = len(s.x)
    start = s.optimizer.public_state
    whole = terms_of(s, slice(None))
    seen = []
    weigh = s.optimizer._weigh
    monkeypatch.setattr(
        s.optimizer, "_weigh", lambda *batch: seen.append(weigh(*batch)) or seen[-1]
    )
    parameters = [p.detach().clone() for p in s.optimizer.params]

    for removed in (None, 0, n - 1):
        with torch.no_grad():
            for p, old in zip(s.optimizer.params, parameters, strict=True):
                p.copy_(old)
        s.optimizer.public_state = start
        seen.clear()
        rows = [i for i in range(n) if i != removed]
        loader = DataLoader(TensorDataset(s.x, s.y), batch_sampler=[rows])
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=s.optimizer
        ) as physical:
            for x, y in physical:
                s.optimizer.zero_grad()
                s.criterion(s.model(x), y).backward()
                s.optimizer.step()
        assert len(seen) == 3
        joined = replace(
            seen[0], **{name: torch.cat([getattr(t, name) for t in seen]) for name in TERMS}
        )
        assert_same_terms(joined, whole, rows)
        assert s.optimizer.public_state.steps == start.steps + 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("option", ["weight", "ignore_index", "label_smoothing"])
def test_locality_where_torch_normalises_by_the_batch(option, reduction):
    """Class weights and ignored targets divide torch's mean by what the whole batch decides."""
    value = {"weight": torch.tensor([1.0, 5.0, 20.0]).double(), "ignore_index": 1}.get(option, 0.1)
    criterion = torch.nn.CrossEntropyLoss(reduction=reduction, **{option: value})
    s = setting("mlp", criterion=criterion)

    def gradient_rows(rows):
        s.backward(rows)
        return s.optimizer.pending.rows(s.optimizer.params, len(s.x[rows])).rows

    whole = gradient_rows(slice(None))
    for removed in range(len(s.x)):
        rows = [i for i in range(len(s.x)) if i != removed]
        for p, block in gradient_rows(rows).items():
            torch.testing.assert_close(block, whole[p][rows], rtol=1e-9, atol=1e-9)


@pytest.fixture
def drawn(monkeypatch):
    """The standard deviations that are asked for; the noise itself is 0."""
    asked = []

    def generate(std, reference, generator=None, secure_mode=False):
        asked.append(std)
        return torch.zeros_like(reference)

    monkeypatch.setattr(private_optimizer, "_generate_noise", generate)
    monkeypatch.setattr(opacus_optimizer, "_generate_noise", generate)
    return asked


def contribution(s, rows, drawn):
    """|z(x)|, in units of the noise asked for, and the released sums of a batch of `rows`."""
    optimizer = s.optimizer
    drawn.clear()
    s.backward(rows)
    optimizer.step()
    released = optimizer.last_release
    count = len(optimizer.params)
    gradients = [p.grad * optimizer.expected_batch_size for p in optimizer.params]
    sums = [*gradients, torch.tensor(released.tail_count)]
    if released.direction is not None:
        sums += [torch.tensor(released.saturated_count), *released.direction.values()]
    assert (
        len(drawn) == len(sums) == (2 * count + 2 if released.direction is not None else count + 1)
    )
    return math.sqrt(
        sum((total.norm().item() / std) ** 2 for total, std in zip(sums, drawn, strict=True))
    )


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("direction_share", [0.1, 0.0])
@pytest.mark.parametrize("noise_multiplier", [0.7, 3.0])
def test_nobody_contributes_more_than_the_noise_covers(
    kind, direction_share, noise_multiplier, drawn
):
    """Every sample of a batch, at a state that gives them all kinds of weights."""
    config = replace(CONFIG, direction_share=direction_share)
    for i in range(8):
        s = setting(kind, config=config, noise_multiplier=noise_multiplier, max_grad_norm=0.7)
        aim(s)
        assert contribution(s, [i], drawn) * noise_multiplier <= 1 + 1e-9


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("direction_share", [0.1, 0.0])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_the_worst_sample_reaches_the_bound(kind, direction_share, floor, drawn):
    """A clipped sample above both thresholds uses the whole budget: the noise is not too large."""
    noise_multiplier = 1.3
    config = replace(CONFIG, direction_share=direction_share, floor=floor)
    s = setting(kind, config=config, noise_multiplier=noise_multiplier, max_grad_norm=1e-3)
    s.optimizer.public_state = replace(
        s.optimizer.public_state, threshold=1e-6, scale=1e-6, steps=1
    )
    assert contribution(s, [0], drawn) * noise_multiplier == pytest.approx(1, abs=2e-3)


def test_a_huge_sample_in_the_warm_up_stays_within_the_bound(drawn):
    s = setting("mlp", noise_multiplier=1.0, max_grad_norm=1.0)
    s.x = s.x * 1e6
    assert s.optimizer.public_state.steps < CONFIG.warmup_steps
    assert contribution(s, [0], drawn) <= 1 + 1e-9


@pytest.mark.parametrize("where", ["input", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_contributes_nothing(where, value, drawn):
    """Plain Opacus turns every parameter NaN instead, which gives the sample away."""
    s = setting("mlp", n=6, noise_multiplier=1.0)
    aim(s)
    start = s.optimizer.public_state
    others = [0, 1, 2, 4, 5]
    before = [p.detach().clone() for p in s.optimizer.params]

    def released(rows, losses=None):
        with torch.no_grad():
            for p, old in zip(s.optimizer.params, before, strict=True):
                p.copy_(old)
        s.optimizer.public_state = start
        s.backward(rows)
        s.optimizer.step(losses=losses)
        r = s.optimizer.last_release
        return [*(p.grad.clone() for p in s.optimizer.params), *r.direction.values()], (
            r.tail_count,
            r.saturated_count,
        )

    expected_sums, expected_counts = released(others)
    if where == "input":
        s.x[3] = value
        sums, counts = released(slice(None))
    else:
        s.backward()
        losses = s.optimizer.pending.losses().clone()
        losses[3] = value
        sums, counts = released(slice(None), losses)
    assert counts == pytest.approx(expected_counts)
    for got, expected in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
