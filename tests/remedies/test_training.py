"""Every remedy trains as a loop written out by hand does, with the same steps and batches."""

from __future__ import annotations

import pytest
import reference
import torch
from models import mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from irw_optim.remedies import REMEDIES, Recipe, Training
from irw_optim.remedies._data import Samples
from irw_optim.schemes import ClassByClassSampler

N, STEPS, BATCH, RATE = 90, 10, 20, 0.1
TOLERANCE = 1e-9


def make_model():
    return mlp(3, 5, 3).double()


def data():
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()
    return x, torch.tensor([0, 0, 0, 0, 2])[torch.arange(N) % 5]  # nobody is of class 1


class Counted(torch.optim.SGD):
    taken = 0

    def step(self, closure=None):
        Counted.taken += 1
        return super().step(closure)


def training(steps=STEPS):
    x, y = data()
    recipe = Recipe(
        make_model,
        nn.CrossEntropyLoss(),
        lambda parameters: Counted(parameters, lr=RATE),
        torch.optim.lr_scheduler.CosineAnnealingLR,
        steps,
        BATCH,
    )
    samples = Samples("train", (x, y), make_model(), recipe.criterion, {})
    return Training(recipe, samples, y, 3, 7, 0.3)


def by_hand(gradient_of, steps=STEPS, order=None):
    """SGD with cosine decay from seed 7; ``gradient_of(model, x, y, step)`` fills the gradients."""
    torch.manual_seed(7)
    model, (x, y) = make_model(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, pieces = torch.Generator().manual_seed(7), []
    while len(pieces) < steps:
        drawn = torch.randperm(N, generator=generator) if order is None else torch.tensor(order())
        pieces += list(drawn.split(BATCH))[: N // BATCH]
    for step, piece in enumerate(pieces[:steps]):
        optimizer.zero_grad()
        gradient_of(model, x[piece], y[piece], step)
        optimizer.step()
        schedule.step()
    return model


def plain(model, x, y, step):
    F.cross_entropy(model(x), y).backward()


def balanced(model, x, y, step):
    shares = torch.tensor([0.8, 1.0, 0.2], dtype=torch.float64)
    (F.cross_entropy(model(x), y, reduction="none") / shares[y] / 2).mean().backward()


def weighted(alpha, warm_up=0, **options):
    def gradient_of(model, x, y, step):
        if step < warm_up:
            return plain(model, x, y, step)
        losses = F.cross_entropy(model(x), y, reduction="none")
        parameters = list(model.parameters())
        weights = reference.step(losses, parameters, alpha, **options).weights
        F.cross_entropy(model(x), y, reduction="none").mul(weights).sum().backward()
        return None

    return gradient_of


def second_stage(by):
    early, (x, y) = by_hand(balanced, steps=STEPS // 5), data()
    sampler = ClassByClassSampler(
        *(early, nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), batch_size=32)),
        by=by,
        generator=torch.Generator().manual_seed(7),
        progress=False,
    )
    return by_hand(plain, order=lambda: list(sampler))


EXPECTED = {
    "plain": lambda: by_hand(plain),
    "moved threshold": lambda: by_hand(plain),
    "class-balanced": lambda: by_hand(balanced),
    "balanced, half the steps": lambda: by_hand(balanced, steps=STEPS // 2),
    "two stages, by losses": lambda: second_stage("losses"),
    "two stages, by gradients": lambda: second_stage("gradients"),
    "IRW": lambda: by_hand(weighted(0.3)),
    "IRW, centred": lambda: by_hand(weighted(0.3, warm_up=3, center=1.0)),
}
STEPS_TAKEN = {"balanced, half the steps": STEPS // 2} | dict.fromkeys(
    ["two stages, by losses", "two stages, by gradients"], STEPS + STEPS // 5
)


@pytest.mark.parametrize("name", REMEDIES)
def test_equal_to_a_loop_written_out(name):
    Counted.taken = 0
    fitted = REMEDIES[name](training())
    assert Counted.taken == STEPS_TAKEN.get(name, STEPS)
    expected = EXPECTED[name]()
    for one, other in zip(fitted.model.parameters(), expected.parameters(), strict=True):
        assert reference.error(one.detach(), other.detach()) < TOLERANCE


def test_the_threshold_is_moved_by_the_shares_and_a_class_without_people_is_never_said():
    shift = REMEDIES["moved threshold"](training()).shift
    logits = torch.randn(50, 3)
    expected = logits[:, [0, 2]].softmax(1) / torch.tensor([0.8, 0.2])
    assert torch.equal((logits + shift).argmax(1), torch.tensor([0, 2])[expected.argmax(1)])


def test_what_several_begin_with_is_trained_once_and_counts_for_each():
    shared = training()
    REMEDIES["plain"](shared)
    REMEDIES["two stages, by losses"](shared)
    Counted.taken, shared.spared = 0, 0.0
    REMEDIES["moved threshold"](shared)
    assert Counted.taken == 0
    assert shared.spared > 0
    REMEDIES["two stages, by gradients"](shared)
    assert Counted.taken == STEPS


def test_effective_shares():
    sizes = torch.tensor([72.0, 18.0])
    expected = 2**2 / (1 / sizes).sum() / N
    assert REMEDIES["class-balanced"](training()).effective_share == pytest.approx(float(expected))
    assert REMEDIES["plain"](training()).effective_share == 1.0
    assert 0 < REMEDIES["IRW"](training()).effective_share < 1
    assert REMEDIES["two stages, by losses"](training()).held


@pytest.mark.parametrize("kind", [nn.BCEWithLogitsLoss, nn.CrossEntropyLoss])
def test_the_reduction_of_the_criterion_is_kept(kind):
    x, y = data()
    outputs = 1 if kind is nn.BCEWithLogitsLoss else 2

    def small():
        return nn.Linear(3, outputs).double()

    criterion = kind(reduction="sum")
    recipe = Recipe(
        small, criterion, lambda p: torch.optim.SGD(p, lr=0.01), None, steps=4, batch_size=N
    )
    samples = Samples("train", (x, (y > 0).float()), small(), criterion, {})
    found = Training(recipe, samples, (y > 0).long(), 2, 3, 0.3).fit().model

    torch.manual_seed(3)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        target = (y > 0).double()[:, None] if outputs == 1 else (y > 0).long()
        criterion(model(x), target).backward()
        optimizer.step()
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        assert reference.error(one.detach(), other.detach()) < TOLERANCE


IMPOSSIBLE = {
    "no step": ({"share": 0}, r"share=0: expected a number in \(0, 1\]"),
    "more than there are": ({"share": 2.0}, "share=2.0"),
    "two objectives": (
        {"objective": lambda losses, labels: losses.mean(), "irw": {"alpha": 0.3}},
        "objective and irw",
    ),
    "no batch": ({"sampler": SequentialSampler(range(BATCH - 1))}, "drew 19 samples: expected"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_fit_cannot_do_is_named_before_a_step(case):
    options, named = IMPOSSIBLE[case]
    Counted.taken = 0
    with pytest.raises(ValueError, match=named):
        training().fit(**options)
    assert Counted.taken == 0
