"""Each method against an independent evaluation of the formula in its paper."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from scipy import optimize
from torch import nn

from benchmarks.data.memory import drawn, shuffled
from benchmarks.data.sources import Samples
from benchmarks.methods import intrinsic, objectives, stages
from benchmarks.models import mlp, outputs_of
from benchmarks.training import Recipe, train

RECIPE = Recipe(steps=6, batch=16, lr=0.01, widths=(4,))


@pytest.fixture
def data():
    x = torch.randn(48, 3)
    y = (x[:, 0] + torch.randn(48) > 0.7).long()
    groups = {"g": 2 * y + (x[:, 1] > 0.5).long()}
    return Samples(x, y, groups, {"g": list("abcd")})


def batch_of(data, size=16):
    index = torch.arange(size)
    losses = torch.rand(size, requires_grad=True)
    return losses, index


def gradient(objective, losses, index):
    (found,) = torch.autograd.grad(objective(losses, index), losses)
    return found


def test_plain_is_the_mean(data):
    losses, index = batch_of(data)
    assert torch.allclose(gradient(objectives.mean, losses, index), torch.full((16,), 1 / 16))


def test_class_balanced_weighs_by_the_inverse_frequency(data):
    losses, index = batch_of(data)
    found = gradient(objectives.class_balanced().objective(data, RECIPE), losses, index)
    shares = [float((data.y == c).float().mean()) for c in (0, 1)]
    weights = np.array([1 / shares[c] for c in data.y.tolist()])
    assert np.allclose(found.numpy(), weights[:16] / weights.mean() / 16)
    # Over the whole training part both classes have the same weight.
    assert np.isclose(weights[data.y == 0].sum(), weights[data.y == 1].sum())


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_cvar_descends_the_minimum_of_rockafellar_and_uryasev(data, alpha):
    model, index = mlp(3, *RECIPE.widths, 2), torch.arange(16)
    method = intrinsic.Intrinsic(alpha, 0.0, {"weighting": "cvar"})
    trainer = method.prepare(model, data, RECIPE, seed=0)
    losses = nn.functional.cross_entropy(model(data.x[:16]), data.y[:16], reduction="none")
    # A minimum of this piecewise linear function is at one of the losses, and flat below it.
    duals = [t + (losses - t).clamp(min=0).mean() / alpha for t in losses.detach() - 1e-4]
    dual = min(duals, key=torch.Tensor.item)
    expected = torch.autograd.grad(dual, list(model.parameters()), retain_graph=True)
    trainer.backward(losses, index)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


class TestChiSquare:
    @pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
    def test_is_the_maximum_over_the_ball(self, alpha):
        losses = torch.rand(8, dtype=torch.float64) * 3
        radius = (1 / alpha - 1) ** 2
        values = losses.numpy()
        primal = optimize.minimize(
            lambda q: -q @ values,
            np.full(8, 1 / 8),
            jac=lambda q: -values,
            bounds=[(0, 1)] * 8,
            constraints=[
                {"type": "eq", "fun": lambda q: q.sum() - 1},
                {"type": "ineq", "fun": lambda q: radius - ((8 * q - 1) ** 2).mean() / 2},
            ],
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-10},
        )
        # Whether the search calls itself a success is a matter of its last digits.
        assert primal.x.sum() == pytest.approx(1)
        assert ((8 * primal.x - 1) ** 2).mean() / 2 <= radius + 1e-6
        assert float(objectives.chi_square_risk(losses, alpha)) == pytest.approx(
            -primal.fun, rel=1e-5
        )

    @pytest.mark.parametrize("alpha", [0.3, 0.5])
    def test_gradient_is_the_maximising_distribution(self, alpha):
        losses = torch.rand(8, dtype=torch.float64, requires_grad=True)
        (q,) = torch.autograd.grad(objectives.chi_square_risk(losses, alpha), losses)
        assert (q >= 0).all()
        assert float(q.sum()) == pytest.approx(1, rel=1e-5)
        assert (q @ losses).item() == pytest.approx(
            objectives.chi_square_risk(losses, alpha).item(), rel=1e-5
        )

    def test_a_ball_with_every_distribution_has_the_largest_loss(self):
        losses = torch.rand(8, requires_grad=True)
        (q,) = torch.autograd.grad(objectives.chi_square_risk(losses, 0.1), losses)
        assert q.tolist() == (losses == losses.max()).float().tolist()

    def test_alpha_1_is_the_mean(self):
        losses = torch.rand(5)
        assert objectives.chi_square_risk(losses, 1.0) == losses.mean()

    def test_equal_losses(self):
        assert float(objectives.chi_square_risk(torch.full((5,), 0.7), 0.3)) == pytest.approx(0.7)


class TestARL:
    def test_weights_are_those_of_the_paper(self):
        logits = torch.randn(7)
        f = 1 / (1 + np.exp(-logits.double().numpy()))
        assert np.allclose(objectives.adversarial_weights(logits), 1 + 7 * f / f.sum(), rtol=1e-5)

    def test_learner_has_the_weights_and_the_adversary_ascends(self, data):
        torch.manual_seed(3)
        objective = objectives.arl(lr=0.01).objective(data, RECIPE)
        torch.manual_seed(3)
        adversary = nn.Linear(3 + 2, 1)
        losses, index = batch_of(data)
        one_hot = torch.eye(2)[data.y[index]]
        inputs = torch.cat([data.x[index], one_hot], 1)

        def reward():
            f = torch.sigmoid(adversary(inputs)[:, 0])
            return ((1 + len(f) * f / f.sum()) * losses.detach()).mean()

        f = torch.sigmoid(adversary(inputs)[:, 0]).detach()
        first = gradient(objective, losses, index)
        assert torch.allclose(first, (1 + 16 * f / f.sum()) / 16)
        # One step of Adam moves each parameter by lr in the direction of the reward's gradient.
        before = reward().item()
        for parameter, g in zip(
            adversary.parameters(),
            torch.autograd.grad(reward(), adversary.parameters()),
            strict=True,
        ):
            parameter.data += 0.01 * g / (g.abs() + 1e-8)
        assert reward().item() > before
        f = torch.sigmoid(adversary(inputs)[:, 0]).detach()
        second = gradient(objective, losses, index)
        assert torch.allclose(second, (1 + 16 * f / f.sum()) / 16, atol=1e-6)


class TestGroupDRO:
    def test_two_steps_by_hand(self, data):
        objective = objectives.group_dro("g", step=0.5).objective(data, RECIPE)
        losses, index = batch_of(data)
        member = data.groups["g"][index]
        q = np.ones(4)
        for _ in range(2):
            found = gradient(objective, losses, index)
            means = np.array(
                [
                    losses[member == g].mean().item() if (member == g).any() else 0.0
                    for g in range(4)
                ]
            )
            q = q * np.exp(0.5 * means)
            q /= q.sum()
            sizes = np.array([int((member == g).sum()) for g in member])
            assert np.allclose(found.numpy(), q[member.numpy()] / sizes, rtol=1e-4)

    def test_groups_are_drawn_evenly(self, data):
        weights = objectives.even_groups("g")(data)
        sums = torch.zeros(4).index_add(0, data.groups["g"], weights)
        assert torch.allclose(sums, torch.ones(4))


class TestJTT:
    def test_errors_of_the_early_model_are_drawn_more_often(self, data):
        state = torch.get_rng_state()
        model = mlp(3, *RECIPE.widths, 2)
        trainer = stages.JTT(early=0.5, times=7).prepare(model, data, RECIPE, seed=1)
        early = train(data, objectives.plain(), Recipe(3, 16, 0.01, (4,)), seed=1)
        wrong = outputs_of(early, data.x).argmax(1) != data.y
        assert wrong.any()
        assert not wrong.all()
        expected = drawn(torch.where(wrong, 7.0, 1.0), 16, seed=1)
        for _ in range(3):
            assert torch.equal(next(trainer.batches), next(expected))
        again = stages.JTT(0.5, 7, class_balance=True).prepare(model, data, RECIPE, seed=1)
        weights = torch.where(wrong, 7.0, 1.0)
        for label in (0, 1):
            weights[data.y == label] /= weights[data.y == label].sum()
        assert torch.equal(next(again.batches), next(drawn(weights, 16, seed=1)))
        torch.set_rng_state(state)


class TestMovedThreshold:
    def test_moves_it_to_the_share_of_the_second_class(self):
        labels = torch.tensor([0] * 8 + [1] * 2)
        p = torch.tensor([0.1, 0.19, 0.21, 0.4, 0.6])
        decided = stages.moved(torch.stack([1 - p, p], 1).log(), labels, 1.0).argmax(1)
        assert decided.tolist() == (p > 0.2).long().tolist()

    def test_strength_0_changes_nothing(self):
        logits = torch.randn(5, 3)
        assert torch.equal(stages.moved(logits, torch.tensor([0, 1, 2, 2]), 0.0), logits)


def row_gradients(model, x, y):
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    return reference.per_sample_gradients(losses, model.parameters())


def worst_of_each_class(losses, y, alpha):
    members = torch.zeros(len(y))
    for label in (0, 1):
        own = (y == label).nonzero()[:, 0]
        worst = losses[own].sort(descending=True).indices
        members[own[worst[: math.ceil(alpha * len(own))]]] = 1
    return members


class TestInClasses:
    @pytest.mark.parametrize("early", [0.0, 0.5])
    def test_gradient_of_a_step_by_hand(self, data, early):
        model = mlp(3, *RECIPE.widths, 2)
        method = stages.InClasses(0.25, early=early, center=0.5, floor=0.7)
        trainer = method.prepare(model, data, RECIPE, seed=2)
        index = torch.arange(10, 26)
        x, y = data.x[index], data.y[index]
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        if early:
            pointer = train(data, objectives.class_balanced(), Recipe(3, 16, 0.01, (4,)), seed=2)
            before = nn.functional.cross_entropy(
                outputs_of(pointer, data.x), data.y, reduction="none"
            )
            inside = worst_of_each_class(before, data.y, 0.25)[index]
        else:
            inside = worst_of_each_class(losses.detach(), y, 0.25)
        G = row_gradients(model, x, y)
        s = (G @ (G.T @ (inside - 0.5 * inside.mean()))).clamp(min=0)
        w = torch.zeros(16)
        for label in (0, 1):
            own = y == label
            mean = s[own].mean()
            mass = 0.7 + s[own] / mean.clamp(min=1e-30)
            w[own] = mass / mass.sum() / 2
        trainer.backward(losses, index)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(found, G.T @ w, atol=1e-5)


class TestClassByClass:
    """Two stages: weights of an early class-balanced model, in each class by itself, and stages."""

    def early(self, data):
        return train(data, objectives.class_balanced(), Recipe(3, 16, 0.01, (4,)), seed=2)

    @pytest.mark.parametrize("mix", [0.0, 2 / 3])
    def test_weights_by_hand(self, data, mix):
        model = self.early(data)
        found = stages.class_by_class(stages.intrinsic(0.25), model, data, mix)
        losses = nn.functional.cross_entropy(outputs_of(model, data.x), data.y, reduction="none")
        S = worst_of_each_class(losses, data.y, 0.25)
        G = row_gradients(model, data.x, data.y)
        for label in (0, 1):
            own = data.y == label
            s = (G[own] @ (G[own].T @ S[own])).clamp(min=0)
            expected = (1 - mix) * s / s.sum() + mix / own.sum()
            assert torch.allclose(found[own], expected, atol=1e-6)
            assert float(found[own].sum()) == pytest.approx(1)

    def test_the_control_weighs_by_the_loss(self, data):
        model = self.early(data)
        found = stages.class_by_class(stages.BY_LOSS, model, data, 0.5)
        losses = nn.functional.cross_entropy(outputs_of(model, data.x), data.y, reduction="none")
        for label in (0, 1):
            own = data.y == label
            expected = losses[own] / losses[own].sum() / 2 + 0.5 / own.sum()
            assert torch.allclose(found[own], expected)

    def test_a_class_of_one_sample_has_the_weight_of_any_other(self, data):
        alone = data[torch.cat([(data.y == 0).nonzero()[:, 0], (data.y == 1).nonzero()[:1, 0]])]
        found = stages.class_by_class(stages.intrinsic(0.25), mlp(3, 4, 2), alone, 0.5)
        assert float(found[alone.y == 1]) == pytest.approx(1)

    def test_draws_by_them_and_trains_plainly(self, data):
        model = mlp(3, *RECIPE.widths, 2)
        state = torch.get_rng_state()
        method = stages.ClassByClass(stages.intrinsic(0.25), early=0.5, mix=0.5)
        trainer = method.prepare(model, data, RECIPE, seed=2)
        assert torch.equal(torch.get_rng_state(), state)
        weights = stages.class_by_class(stages.intrinsic(0.25), self.early(data), data, 0.5)
        index, again = next(trainer.batches), next(drawn(weights, 16, seed=2))
        assert torch.equal(index, again)
        losses = nn.functional.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
        trainer.backward(losses, index)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected = row_gradients(model, data.x[index], data.y[index]).mean(0)
        assert torch.allclose(found, expected, atol=1e-6)


class TestGlobal:
    @pytest.mark.parametrize("use", ["reweighting", "resampling"])
    def test_weights_are_renewed_and_used(self, data, use):
        method = intrinsic.Global(intrinsic.Intrinsic(0.3), use)
        model = mlp(3, *RECIPE.widths, 2)
        trainer = method.prepare(model, data, RECIPE, seed=0)
        index = next(trainer.batches)
        G, y = row_gradients(model, data.x, data.y), data.y
        losses = nn.functional.cross_entropy(model(data.x), y, reduction="none")
        S = losses >= losses.sort(descending=True).values[math.ceil(0.3 * 48) - 1]
        w = (G @ G[S].sum(0)).clamp(min=0)
        w = w / w.sum()
        trainer.backward(losses[index], index)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        in_batch = w[index] / w[index].sum() if use == "reweighting" else torch.ones(16) / 16
        assert torch.allclose(found, G[index].T @ in_batch, atol=1e-5)
        if use == "resampling":
            assert (w[index] > 0).all()


class TestLoop:
    def test_methods_share_initialisation_and_batches(self, data):
        plain = train(data, objectives.plain(), RECIPE, seed=5)
        uniform = intrinsic.Intrinsic(1.0, 0.0, {"weighting": "uniform"})
        same = train(data, uniform, RECIPE, seed=5)
        warm = train(data, intrinsic.Intrinsic(0.3, 1.0), RECIPE, seed=5)  # warm-up to the end
        for other in (same, warm):
            for a, b in zip(plain.parameters(), other.parameters(), strict=True):
                assert torch.allclose(a, b, atol=1e-5)

    def test_every_epoch_sees_everybody_once(self):
        batches = list(itertools.islice(shuffled(12, 4, seed=0), 6))
        for epoch in (batches[:3], batches[3:]):
            assert sorted(torch.cat(epoch).tolist()) == list(range(12))

    def test_draws_follow_the_weights(self):
        weights = torch.tensor([0.0, 1.0, 3.0])
        counts = torch.cat(list(itertools.islice(drawn(weights, 100, seed=0), 40))).bincount()
        assert counts[0] == 0
        assert 2.5 < counts[2] / counts[1] < 3.5
