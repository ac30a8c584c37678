"""IRWOptimizer in a training loop: what it promises, against the loop over the samples."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree, gradient_errors
from models import mlp
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer

ALPHA, B = 0.3, 8


def make() -> nn.Module:
    return mlp(4, 6, 3, act=nn.ReLU).double()


def batch(size: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4).double(), torch.randint(3, (size,))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def attached(model: nn.Module, reduction: str = "mean", **options):
    """By ghost alone, which raises where "auto" would mend an error by falling back."""
    criterion = options.pop("criterion", nn.CrossEntropyLoss(reduction=reduction))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"alpha": ALPHA, "model": model, "criterion": criterion, "engine": "ghost", **options}
    return IRWOptimizer(sgd, **options), criterion


def twin_of(model: nn.Module) -> nn.Module:
    """The same parameters, without hooks and gradients."""
    twin = make()
    twin.load_state_dict(model.state_dict())
    return twin


def truth_of(model: nn.Module, x: Tensor, y: Tensor, alpha=ALPHA, **options) -> reference.Step:
    twin = twin_of(model)
    return reference.step(losses_of(twin, x, y), twin.parameters(), alpha, **options)


def plain_gradients(model: nn.Module, loss) -> list[Tensor]:
    """Ordinary gradients of ``loss(model)``."""
    twin = twin_of(model)
    parameters = list(twin.parameters())
    return list(torch.autograd.grad(loss(twin), parameters, materialize_grads=True))


def is_gradient(model: nn.Module, *terms: list[Tensor]) -> None:
    errors = gradient_errors(model, [sum(parts) for parts in zip(*terms, strict=True)])
    assert max(errors.values()) < 1e-9, errors


class TestWays:
    def test_one_line(self):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        truth = truth_of(model, x, y)
        loss = criterion(model(x), y)
        assert loss.item() == pytest.approx(float(truth.losses.mean()), rel=1e-12)
        assert loss.shape == ()
        loss.backward()
        agree(optimizer, model, truth)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for old, p, g in zip(before, model.parameters(), truth.gradients, strict=True):
            assert reference.error(p, old - 0.1 * g) < 1e-12

    def test_losses_of_ones_own(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model, criterion=None)
        truth = truth_of(model, x, y)
        value = optimizer.backward(losses_of(model, x, y))
        assert float(value) == pytest.approx(float(truth.losses.mean()))
        assert not value.requires_grad
        agree(optimizer, model, truth)

    def test_losses_of_ones_own_without_the_model(self):
        model, (x, y) = make(), batch()
        optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA)
        optimizer.backward(losses_of(model, x, y))
        agree(optimizer, model, truth_of(model, x, y))

    def test_losses_of_ones_own_beside_an_attached_criterion(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model)
        optimizer.backward(losses_of(model, x, y))
        agree(optimizer, model, truth_of(model, x, y))

    def test_training_goes_on_like_the_loop(self):
        model = make()
        twin = twin_of(model)
        optimizer, criterion = attached(model)
        plain = torch.optim.SGD(twin.parameters(), lr=0.1)
        for size in (B, B, 3, B, 1, B):
            x, y = batch(size)
            truth = truth_of(model, x, y)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            agree(optimizer, model, truth)
            optimizer.step()
            for p, g in zip(twin.parameters(), truth.gradients, strict=True):
                p.grad = g
            plain.step()
        for ours, its in zip(model.parameters(), twin.parameters(), strict=True):
            assert reference.error(ours, its) < 1e-9

    def test_closure(self):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        truth = truth_of(model, x, y)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx(float(truth.losses.mean()))
        agree(optimizer, model, truth)


class TestTheGradientIsFinalAtBackward:
    def test_clipping(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        truth = truth_of(model, x, y)
        norm = torch.cat([g.flatten() for g in truth.gradients]).norm()
        criterion(model(x), y).backward()
        clipped = nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 4)
        assert float(clipped) == pytest.approx(float(norm))
        factor = float(norm) / 4 / (float(norm) + 1e-6)  # as torch guards against 0
        is_gradient(model, [factor * g for g in truth.gradients])

    @pytest.mark.parametrize("factor", [4.0, 0.25, -1.0, 0.0, 2.0**20])
    def test_a_factor_on_the_loss_scales_the_gradient_alone(self, factor):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        truth = truth_of(model, x, y)
        (factor * criterion(model(x), y)).backward()
        assert reference.error(optimizer.last_step.scores, truth.scores) < 1e-9
        assert reference.error(optimizer.last_step.weights, truth.weights) < 1e-9
        is_gradient(model, [factor * g for g in truth.gradients])

    @pytest.mark.parametrize("factor", [2.0**12, -0.5])
    def test_a_factor_does_not_move_the_outliers(self, factor):
        model, (x, y) = with_an_outlier()
        seen = []

        def filter_(gram: Tensor) -> Tensor:
            seen.append(gram)
            return torch.zeros(len(gram), dtype=torch.bool, device=gram.device)

        _, criterion = attached(model, outliers=filter_)
        twin = twin_of(model)
        G = reference.per_sample_gradients(losses_of(twin, x, y), twin.parameters())
        (factor * criterion(model(x), y)).backward()
        assert reference.error(seen[0], G @ G.T) < 1e-9

    def test_backward_with_a_gradient_of_ones_own(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        criterion(model(x), y).backward(gradient=torch.tensor(3.0).double())
        is_gradient(model, [3 * g for g in truth_of(model, x, y).gradients])

    def test_accumulation_weighs_inside_each_batch(self):
        model = make()
        optimizer, criterion = attached(model)
        parts = [batch(), batch(), batch(3)]
        truths = [truth_of(model, *data) for data in parts]
        for x, y in parts:
            (criterion(model(x), y) / 3).backward()
        is_gradient(model, *([g / 3 for g in truth.gradients] for truth in truths))
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_a_factor_on_losses_of_ones_own(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model, criterion=None)
        truth = truth_of(model, x, y)
        optimizer.backward(losses_of(model, x, y) * 8)
        assert reference.error(optimizer.last_step.weights, truth.weights) < 1e-9
        is_gradient(model, [8 * g for g in truth.gradients])

    def test_gradient_scaler(self):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        truth = truth_of(model, x, y)
        scaler.scale(criterion(model(x), y)).backward()
        scaler.unscale_(optimizer)
        agree(optimizer, model, truth)
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert reference.error(model[0].weight, before - 0.1 * truth.gradients[0]) < 1e-12


class TestOtherTermsOfTheLoss:
    """Terms added to the criterion keep their ordinary gradients.

    Each three times: the engine compares itself with autograd at the first two, which keeps the
    graph for others to use; from then on it has to know by itself who needs the graph.
    """

    @pytest.mark.parametrize(
        "term",
        [
            lambda model, out, x: 0.1 * out.square().mean(),
            lambda model, out, x: 0.01 * sum(p.square().sum() for p in model.parameters()),
            lambda model, out, x: model(x.flip(0)).abs().mean(),
            lambda model, out, x: 0.1 * model[0](x).square().mean(),
        ],
        ids=["of the output", "of the parameters", "of another forward", "of a layer"],
    )
    def test_terms(self, term):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        truth = truth_of(model, x, y)
        added = plain_gradients(model, lambda twin: term(twin, twin(x), x))
        for repeat in (1, 2, 3):
            out = model(x)
            (criterion(out, y) + term(model, out, x)).backward()
            is_gradient(model, *[truth.gradients, added] * repeat)
        assert reference.error(optimizer.last_step.weights, truth.weights) < 1e-9

    def test_a_term_on_the_other_side_of_the_sum(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        truth = truth_of(model, x, y)
        added = plain_gradients(model, lambda twin: 0.1 * twin(x).square().mean())
        for repeat in (1, 2, 3):
            out = model(x)
            (0.1 * out.square().mean() - 2 * criterion(out, y)).backward()
            is_gradient(model, *[[-2 * g for g in truth.gradients], added] * repeat)

    def test_another_criterion_on_the_same_output(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        truth = truth_of(model, x, y)
        other = nn.MSELoss()
        added = plain_gradients(model, lambda twin: twin(x).square().mean())
        for repeat in (1, 2, 3):
            out = model(x)
            (criterion(out, y) + other(out, torch.zeros_like(out))).backward()
            is_gradient(model, *[truth.gradients, added] * repeat)

    def test_two_attached_criteria_on_the_same_graph(self):
        model, (x, y) = make(), batch()
        second = nn.MSELoss()
        first_optimizer, first = attached(model)
        second_optimizer, _ = attached(model, criterion=second)
        target = torch.randn(B, 3).double()
        twin = twin_of(model)
        squares = (twin(x) - target).square().mean(1)
        truths = (
            truth_of(model, x, y),
            reference.step(squares, twin.parameters(), ALPHA),
        )
        for in_order in (True, False, True, False):
            model.zero_grad()
            out = model(x)
            terms = [first(out, y), second(out, target)]
            sum(terms if in_order else reversed(terms)).backward()
            is_gradient(model, *(truth.gradients for truth in truths))
            for optimizer, truth in zip((first_optimizer, second_optimizer), truths, strict=True):
                assert reference.error(optimizer.last_step.weights, truth.weights) < 1e-9

    def test_the_criterion_called_twice_on_the_same_output(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        z = torch.randint(3, (B,))
        truths = truth_of(model, x, y), truth_of(model, x, z)
        for repeat in (1, 2, 3):
            out = model(x)
            (criterion(out, y) + criterion(out, z)).backward()
            is_gradient(model, *[truth.gradients for truth in truths] * repeat)


class TestWhereNothingShouldHappen:
    def test_eval_mode(self):
        model, (x, y) = make().eval(), batch()
        optimizer, criterion = attached(model)
        plain = nn.CrossEntropyLoss()
        assert torch.equal(criterion(model(x), y), plain(model(x), y))
        criterion(model(x), y).backward()
        is_gradient(model, plain_gradients(model, lambda twin: plain(twin(x), y)))
        assert optimizer.last_step is None

    def test_no_grad(self):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        with torch.no_grad():
            loss = criterion(model(x), y)
        assert not loss.requires_grad
        assert torch.equal(loss, nn.CrossEntropyLoss()(model(x), y).detach())
        assert optimizer.last_step is None

    def test_inference_mode(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        with torch.inference_mode():
            assert torch.isfinite(criterion(model(x), y))

    def test_outputs_that_need_no_gradient(self):
        model, (x, y) = make(), batch()
        _, criterion = attached(model)
        loss = criterion(model(x).detach(), y)
        assert torch.allclose(loss, nn.CrossEntropyLoss()(model(x), y))
        assert not loss.requires_grad

    def test_evaluation_between_forward_and_backward(self):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        loss = criterion(model(x), y)
        model.eval()
        with torch.no_grad():
            criterion(model(x), y)
        model.train()
        loss.backward()
        agree(optimizer, model, truth_of(model, x, y))

    def test_output_is_that_of_the_model_without_hooks(self):
        model, (x, _) = make(), batch()
        before = model(x)
        optimizer, _ = attached(model)
        assert torch.equal(model(x), before)
        assert optimizer.last_step is None


class TestBatches:
    def test_empty(self):
        model = make()
        optimizer, criterion = attached(model)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.backward(losses_of(model, *batch(0)))
        optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))
        assert optimizer.last_step.weights.shape == (0,)
        assert optimizer.last_step.effective_sample_size == 0
        x, y = batch()
        truth = truth_of(model, x, y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        agree(optimizer, model, truth)

    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("alpha", [1e-6, 0.5, 1.0])
    def test_small(self, size, alpha):
        model, data = make(), batch(size)
        optimizer, criterion = attached(model, alpha=alpha)
        criterion(model(data[0]), data[1]).backward()
        agree(optimizer, model, truth_of(model, *data, alpha=alpha))

    def test_one_sample_is_plain_training(self):
        model, (x, y) = make(), batch(1)
        _, criterion = attached(model)
        criterion(model(x), y).backward()
        is_gradient(model, plain_gradients(model, lambda m: losses_of(m, x, y).mean()))

    def test_all_samples_alike_are_plain_training(self):
        model, (x, y) = make(), batch(1)
        x, y = x.expand(B, -1), y.expand(B)
        optimizer, criterion = attached(model)
        criterion(model(x), y).backward()
        assert int(optimizer.last_step.worst_off.sum()) == 3  # who, is decided by rounding
        assert torch.allclose(optimizer.last_step.weights, torch.full((B,), 1 / B).double())
        is_gradient(model, plain_gradients(model, lambda m: losses_of(m, x, y).mean()))

    def test_ties_take_the_lower_index(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model, criterion=None, alpha=0.25)

        def tied(net: nn.Module) -> Tensor:
            """Losses of 1, 2, 1, 2, ... to the last bit, each with the gradient of its sample."""
            losses = losses_of(net, x, y)
            return 1.0 + torch.arange(B) % 2 + (losses - losses.detach())

        twin = twin_of(model)
        truth = reference.step(tied(twin), twin.parameters(), 0.25)
        optimizer.backward(tied(model))
        assert optimizer.last_step.worst_off.nonzero().flatten().tolist() == [1, 3]
        agree(optimizer, model, truth)

    def test_everybody_is_worst_off(self):
        model, data = make(), batch()
        optimizer, criterion = attached(model, alpha=1.0)
        criterion(model(data[0]), data[1]).backward()
        assert bool(optimizer.last_step.worst_off.all())
        agree(optimizer, model, truth_of(model, *data, alpha=1.0))

    def test_worst_off_without_gradient_fall_back_to_plain_training(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model, criterion=None, alpha=0.2)
        stuck = torch.where(torch.arange(B) < 2, 0.0, 1.0).double()
        losses = losses_of(model, x, y) * stuck + 100 * (1 - stuck)
        expected = plain_gradients(model, lambda m: (losses_of(m, x, y) * stuck).mean())
        optimizer.backward(losses)
        assert bool(optimizer.last_step.fallback)
        is_gradient(model, expected)


def with_an_outlier() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The fourth of twelve samples is large, and labelled as the model would least expect."""
    model, (x, y) = make(), batch(12)
    x[3] *= 50
    y[3] = model(x)[3].argmin()
    return model, (x, y)


class TestOptions:
    LABELS = torch.tensor([0, 0, 1, 2, 2, 2, 0, 1])

    @pytest.mark.parametrize(
        "options",
        [
            {"center": 1.0},
            {"center": 0.5, "mix": 0.25},
            {"mix": 1.0},
            {"class_balance": True},
            {"class_balance": True, "mix": 0.5, "center": 1.0},
        ],
        ids=str,
    )
    def test_options_against_the_transcription(self, options):
        model, x = make(), batch()[0]
        optimizer, criterion = attached(model, **options)
        literal = {k: v for k, v in options.items() if k != "class_balance"}
        labels = self.LABELS if options.get("class_balance") else None
        truth = truth_of(model, x, self.LABELS, labels=labels, **literal)
        criterion(model(x), self.LABELS).backward()
        assert reference.error(optimizer.last_step.weights, truth.weights) < 1e-9
        is_gradient(model, truth.gradients)

    def test_labels_given_with_losses_of_ones_own(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model, class_balance=True)
        truth = truth_of(model, x, y, labels=self.LABELS)
        optimizer.backward(losses_of(model, x, y), labels=self.LABELS)
        agree(optimizer, model, truth)

    @pytest.mark.parametrize("mix", [0.0, 0.5])
    def test_outliers_leave_before_anything_else(self, mix):
        model, (x, y) = with_an_outlier()
        removed: list[int] = []

        def far_ones(gram: Tensor) -> Tensor:
            removed.extend(
                (gram.diagonal() > 4 * gram.diagonal().median()).nonzero().flatten().tolist()
            )
            return gram.diagonal() > 4 * gram.diagonal().median()

        optimizer, criterion = attached(model, outliers=far_ones, mix=mix)
        criterion(model(x), y).backward()
        assert 3 in removed
        agree(optimizer, model, truth_of(model, x, y, removed=removed, mix=mix))
        assert optimizer.last_step.outliers.nonzero().flatten().tolist() == removed
        assert not optimizer.last_step.weights[removed].any()

    def test_dbscan_sees_the_distances_of_the_gradients(self):
        model, (x, y) = with_an_outlier()
        twin = twin_of(model)
        G = reference.per_sample_gradients(losses_of(twin, x, y), twin.parameters())
        near = torch.cdist(G, G) <= 3.0
        core = near.sum(1) >= 4
        noise = [i for i in range(12) if not core[i] and not (near[i] & core).any()]
        assert 0 < len(noise) < 12
        optimizer, criterion = attached(model, outliers=DBSCANFilter(eps=3.0, min_samples=4))
        criterion(model(x), y).backward()
        agree(optimizer, model, truth_of(model, x, y, removed=noise))

    def test_options_that_are_off_change_no_bit(self):
        x, y = batch()
        gradients = []
        for options in (
            {},
            {
                "outliers": None,
                "center": 0.0,
                "class_balance": False,
                "mix": 0.0,
                "warmup_steps": 0,
                "score_parameters": None,
                "engine": "auto",
                "weighting": "irw",
            },
        ):
            torch.manual_seed(1)
            model = make()
            _, criterion = attached(model, **options)
            criterion(model(x), y).backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *gradients))

    def test_warm_up_is_plain_training(self):
        model = make()
        twin = twin_of(model)
        optimizer, criterion = attached(model, warmup_steps=3)
        plain, sgd = nn.CrossEntropyLoss(), torch.optim.SGD(twin.parameters(), lr=0.1)
        for step in range(3):
            x, y = batch()
            optimizer.zero_grad()
            sgd.zero_grad()
            loss, expected = criterion(model(x), y), plain(twin(x), y)
            assert torch.allclose(loss, expected)
            loss.backward()
            expected.backward()
            is_gradient(model, [p.grad for p in twin.parameters()])
            assert optimizer.last_step.effective_sample_size == pytest.approx(B)
            optimizer.step()
            sgd.step()
            assert optimizer.steps == step + 1
        x, y = batch()
        truth = truth_of(model, x, y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        agree(optimizer, model, truth)

    @pytest.mark.parametrize(
        ("weighting", "scores"),
        [
            ("uniform", lambda losses, worst: [1.0] * len(losses)),
            ("cvar", lambda losses, worst: [float(i in worst) for i in range(len(losses))]),
            (lambda losses, gradients, worst: losses, lambda losses, worst: losses),
        ],
        ids=["uniform", "cvar", "callable"],
    )
    def test_other_weightings(self, weighting, scores):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model, weighting=weighting)
        truth = truth_of(model, x, y)
        worst = set(truth.worst_off.nonzero().flatten().tolist())
        weights = torch.tensor(scores(truth.losses.tolist(), worst), dtype=torch.float64)
        weights /= weights.sum()
        criterion(model(x), y).backward()
        assert reference.error(optimizer.last_step.weights, weights) < 1e-9
        is_gradient(model, plain_gradients(model, lambda m: losses_of(m, x, y) @ weights))


class TestRecord:
    def test_contents(self):
        model, (x, y) = make(), batch()
        optimizer, criterion = attached(model)
        assert optimizer.last_step is None
        criterion(model(x), y).backward()
        record = optimizer.last_step
        for tensor in (
            record.losses,
            record.worst_off,
            record.outliers,
            record.scores,
            record.weights,
        ):
            assert tensor.shape == (B,)
            assert not tensor.requires_grad
        assert record.worst_off.dtype is record.outliers.dtype is torch.bool
        assert int(record.worst_off.sum()) == 3
        assert not record.outliers.any()
        assert not record.fallback
        assert torch.equal(record.labels, y)
        assert float(record.weights.sum()) == pytest.approx(1)
        ess = 1 / float(record.weights.square().sum())
        assert record.effective_sample_size == pytest.approx(ess)
        assert 1 <= record.effective_sample_size <= B

    def test_it_is_the_newest_backward_pass_and_outlives_the_step(self):
        model = make()
        optimizer, criterion = attached(model)
        for _ in range(2):
            x, y = batch()
            truth = truth_of(model, x, y)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert reference.error(optimizer.last_step.losses, truth.losses) < 1e-12


class TestDetach:
    def test_leaves_everything_as_it_was(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        before = [dict(vars(m)) for m in (*model.modules(), criterion)]
        hooks = [
            {k: len(v) for k, v in state.items() if "hooks" in k and v is not None}
            for state in before
        ]
        optimizer, _ = attached(model, criterion=criterion)
        x, y = batch()
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.detach()
        after = [dict(vars(m)) for m in (*model.modules(), criterion)]
        assert [state.keys() for state in after] == [state.keys() for state in before]
        assert hooks == [
            {k: len(v) for k, v in state.items() if "hooks" in k and v is not None}
            for state in after
        ]
        loss = criterion(model(x), y)
        loss.backward()
        is_gradient(model, plain_gradients(model, lambda m: losses_of(m, x, y).mean()))

    def test_can_be_repeated_and_followed_by_another_attachment(self):
        model, (x, y) = make(), batch()
        first, criterion = attached(model)
        first.detach()
        first.detach()
        second, _ = attached(model, criterion=criterion)
        criterion(model(x), y).backward()
        agree(second, model, truth_of(model, x, y))
        assert first.last_step is None

    def test_a_forward_that_the_criterion_had_of_its_own_comes_back(self):
        model, criterion = make(), nn.CrossEntropyLoss()
        own = criterion.forward
        criterion.forward = own
        optimizer, _ = attached(model, criterion=criterion)
        optimizer.detach()
        assert criterion.__dict__["forward"] is own

    def test_losses_of_ones_own_still_work_afterwards(self):
        model, (x, y) = make(), batch()
        optimizer, _ = attached(model)
        optimizer.detach()
        optimizer.backward(losses_of(model, x, y))
        agree(optimizer, model, truth_of(model, x, y))

    def test_state_dict_keys_are_the_models_own(self):
        model = make()
        keys = list(model.state_dict())
        optimizer, _ = attached(model)
        assert list(model.state_dict()) == keys
        optimizer.detach()
