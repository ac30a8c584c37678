"""Whole trainings through the engine: physical batches, empty batches, accounting, checkpoints."""

import copy
import io
import math
import pickle

import pytest
import torch
from models import mlp
from opacus.grad_sample import GradSampleHooks
from opacus.schedulers import ExponentialNoise, LambdaNoise, StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from private_zoo import CLASSES, CONFIG, ZOO, aim, setting
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import PerSampleLoss
from irw_optim.privacy import (
    DPGuaranteeError,
    IRWDPConfig,
    IRWDPOptimizer,
    IRWPrivacyEngine,
)

N, BATCH = 48, 12


def dataset(n=N):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (n,), generator=generator))


def private(*, accountant="rdp", seed=0, data=None, batch_size=BATCH, criterion=None, **options):
    """An engine and what its make_private returned, with the criterion that it follows."""
    torch.manual_seed(seed)
    model = mlp(6, 8, CLASSES)
    engine = IRWPrivacyEngine(accountant=accountant)
    criterion = criterion or nn.CrossEntropyLoss()
    model, optimizer, loader = engine.make_private(
        **{
            "module": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
            "data_loader": DataLoader(data or dataset(), batch_size=batch_size),
            "criterion": criterion,
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "irw": CONFIG,
            "noise_generator": torch.Generator().manual_seed(seed),
            **options,
        }
    )
    return engine, model, optimizer, loader, criterion


def train(model, optimizer, batches, criterion):
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def state_tensors(optimizer):
    state = optimizer.public_state
    return [torch.tensor([state.threshold, state.scale]), *state.direction.values()]


# Physical and empty batches ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("physical", [1, 3, 8])
def test_physical_batches_add_up_to_the_logical_one(kind, physical):
    """Same noise, three logical batches: the same parameters and the same public state."""

    def run(max_physical):
        generator = torch.Generator().manual_seed(0)
        s = setting(kind, noise_multiplier=0.5, generator=generator)
        aim(s)
        rows = [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5], [0, 2, 4, 6]]
        loader = DataLoader(TensorDataset(s.x, s.y), batch_sampler=rows)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=max_physical, optimizer=s.optimizer
        ) as batches:
            train(s.model, s.optimizer, batches, s.criterion)
        assert s.optimizer.public_state.steps == 5 + len(rows)
        return [*parameters_of(s.model), *state_tensors(s.optimizer)]

    assert_same(run(physical), run(100), rtol=1e-9, atol=1e-12)


def test_a_loop_that_broke_off_can_be_started_again():
    """The samples of the unfinished batch must not count twice."""
    s, fresh = setting("mlp"), setting("mlp")
    loader = DataLoader(TensorDataset(s.x, s.y), batch_sampler=[list(range(8))])

    def batches(optimizer):
        return BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
        )

    with batches(s.optimizer) as physical:
        train(s.model, s.optimizer, [next(iter(physical))], s.criterion)
    s.optimizer.discard_batch()
    for each in (s, fresh):
        with batches(each.optimizer) as physical:
            train(each.model, each.optimizer, physical, each.criterion)
    assert_same(parameters_of(s.model), parameters_of(fresh.model))
    assert s.optimizer.public_state.steps == 1


def test_zero_grad_between_physical_batches_keeps_the_sums():
    s = setting("mlp")
    loader = DataLoader(TensorDataset(s.x, s.y), batch_sampler=[list(range(8))])
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=s.optimizer
    ) as batches:
        for x, y in batches:  # zero_grad after step, as Opacus' tutorials have it
            s.criterion(s.model(x), y).backward()
            s.optimizer.step()
            s.optimizer.zero_grad()
    split = parameters_of(s.model)
    whole = setting("mlp")
    whole.backward()
    whole.optimizer.step()
    assert_same(split, parameters_of(whole.model))


@pytest.mark.parametrize("kind", ["mlp", "cnn_group_norm"])
def test_an_empty_batch_steps_adds_noise_and_is_accounted_for(kind):
    s = setting(kind, noise_multiplier=1.0)
    accounted = []
    s.optimizer.attach_step_hook(lambda optimizer: accounted.append(optimizer.noise_multiplier))
    before = parameters_of(s.model)
    s.backward(slice(0, 0))
    s.optimizer.step()
    assert accounted == [1.0]
    assert s.optimizer.public_state.steps == 1
    assert all(not torch.equal(p, q) for p, q in zip(before, parameters_of(s.model), strict=True))


def test_a_model_that_cannot_run_on_nothing_is_stepped_without_it():
    s = setting("embedding_lstm", noise_multiplier=1.0)
    accounted = []
    s.optimizer.attach_step_hook(lambda optimizer: accounted.append(1))
    s.optimizer.step(losses=torch.zeros(0))
    s.optimizer.zero_grad()
    s.backward()
    s.optimizer.step()
    assert accounted == [1, 1]


def test_poisson_batches_of_every_size_train():
    """A sampling rate at which some batches are empty; every draw is one accounted step."""
    engine, model, optimizer, loader, criterion = private(batch_size=1, data=dataset(30))
    sizes = []
    for x, y in loader:
        sizes.append(len(x))
        if not sizes[-1]:
            optimizer.step(losses=torch.zeros(0))
        else:
            train(model, optimizer, [(x, y)], criterion)
        optimizer.zero_grad()
    assert 0 in sizes
    assert max(sizes) > 1
    assert engine.accountant.history == [(1.0, 1 / 30, len(sizes))]


# Ways in --------------------------------------------------------------------------------------


def test_losses_by_the_criterion_and_by_hand_agree():
    by_criterion, by_hand = setting("mlp"), setting("mlp")
    by_hand.optimizer.pending.unfollow()
    for _ in range(3):
        by_criterion.backward()
        by_criterion.optimizer.step()
        by_hand.optimizer.zero_grad()
        losses = nn.functional.cross_entropy(by_hand.model(by_hand.x), by_hand.y, reduction="none")
        losses.mean().backward()
        by_hand.optimizer.step(losses=losses)
    assert_same(parameters_of(by_criterion.model), parameters_of(by_hand.model))
    assert_same(state_tensors(by_criterion.optimizer), state_tensors(by_hand.optimizer))


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_opacus_ways_to_per_sample_gradients_agree(mode):
    def run(mode):
        _, model, optimizer, _, criterion = private(grad_sample_mode=mode)
        x, y = dataset().tensors
        train(model, optimizer, [(x[:9], y[:9]), (x[9:20], y[9:20])], criterion)
        return parameters_of(model)

    assert_same(run(mode), run("hooks"), rtol=1e-5, atol=1e-6)


def test_the_model_can_stay_unwrapped():
    model = nn.Sequential(nn.Linear(6, CLASSES))
    _, hooks, optimizer, loader, criterion = private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), wrap_model=False
    )
    assert isinstance(hooks, GradSampleHooks)
    train(model, optimizer, loader, criterion)
    assert optimizer.public_state.steps == len(loader)


def test_the_value_of_the_loss_is_the_criterions_own():
    weight = torch.tensor([1.0, 2.0, 5.0])
    _, model, _, _, criterion = private(criterion=nn.CrossEntropyLoss(weight=weight))
    x, y = dataset().tensors
    expected = nn.functional.cross_entropy(model(x), y, weight=weight)
    torch.testing.assert_close(criterion(model(x), y), expected)
    model.eval()
    assert torch.equal(criterion(model(x), y), expected)


def test_any_per_sample_loss_can_be_the_criterion():
    criterion = PerSampleLoss(lambda output, y: -output.log_softmax(1)[range(len(y)), y])
    _, ours, optimizer, _, _ = private(criterion=criterion)
    _, torchs, reference, _, cross_entropy = private()
    x, y = dataset().tensors
    train(ours, optimizer, [(x[:5], y[:5])], criterion)
    train(torchs, reference, [(x[:5], y[:5])], cross_entropy)
    assert_same(parameters_of(ours), parameters_of(torchs))


def test_zero_grad_between_forward_and_backward_is_harmless():
    s = setting("mlp")
    loss = s.criterion(s.model(s.x), s.y)
    s.optimizer.zero_grad()
    loss.backward()
    s.optimizer.step()
    assert s.optimizer.public_state.steps == 1


def test_losses_that_are_only_looked_at_do_not_count():
    s = setting("mlp")
    s.criterion(s.model(s.x), s.y)  # a forward without backward, as for a printout
    with torch.no_grad():
        s.criterion(s.model(s.x), s.y)
    s.model.eval()
    s.criterion(s.model(s.x), s.y)
    with pytest.raises(DPGuaranteeError, match="losses are missing"):
        s.optimizer.step()


def test_a_layer_frozen_in_the_middle_of_a_logical_batch_stays_as_it_is():
    s = setting("mlp")
    first = next(s.model.parameters())
    before = first.detach().clone()
    for skip in (True, False):
        s.optimizer.signal_skip_step(skip)
        s.optimizer.zero_grad()
        s.criterion(s.model(s.x), s.y).backward()
        s.optimizer.step()
        first.requires_grad_(False)
    assert torch.equal(first, before)
    assert s.optimizer.public_state.steps == 1


def test_a_forward_that_never_went_backward_is_named():
    """Opacus' hooks wait for it."""
    s = setting("mlp")
    s.criterion(s.model(s.x), s.y)
    s.optimizer.zero_grad()
    s.criterion(s.model(s.x), s.y).backward()
    with pytest.raises(ValueError, match=r"call backward .* after every forward in train mode"):
        s.optimizer.step()


def test_a_new_training_takes_the_criterion_over():
    _, _, first, _, criterion = private()
    _, model, second, loader, _ = private(criterion=criterion)
    train(model, second, loader, criterion)
    assert (first.public_state.steps, second.public_state.steps) == (0, len(loader))


# Accounting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_one_step_is_accounted_as_one_sampled_gaussian(accountant):
    engine, model, optimizer, loader, criterion = private(accountant=accountant)
    for _ in range(3):
        train(model, optimizer, loader, criterion)
    assert engine.accountant.history == [(1.0, BATCH / N, 3 * N // BATCH)]
    reference = copy.copy(engine.accountant)
    reference.history = [(1.0, BATCH / N, 3 * N // BATCH)]
    assert engine.get_epsilon(1e-5) == pytest.approx(reference.get_epsilon(delta=1e-5))


def test_physical_batches_are_accounted_once():
    engine, model, optimizer, loader, criterion = private()
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as batches:
        train(model, optimizer, batches, criterion)
    assert engine.accountant.history == [(1.0, BATCH / N, N // BATCH)]


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_a_target_epsilon_is_reached_and_not_passed(accountant):
    torch.manual_seed(0)
    model = nn.Linear(6, CLASSES)
    criterion = nn.CrossEntropyLoss()
    engine = IRWPrivacyEngine(accountant=accountant)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset(), batch_size=BATCH),
        criterion=criterion,
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=5,
        max_grad_norm=1.0,
        irw=CONFIG,
    )
    for _ in range(5):
        train(model, optimizer, loader, criterion)
    assert 2.9 < engine.get_epsilon(1e-5) <= 3.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (lambda o: ExponentialNoise(o, gamma=0.5), [2.0, 1.0, 0.5]),
        (lambda o: StepNoise(o, step_size=2, gamma=0.5), [2.0, 2.0, 1.0]),
        (lambda o: LambdaNoise(o, noise_lambda=lambda t: 1 + t), [2.0, 4.0, 6.0]),
    ],
)
def test_noise_schedulers_move_all_noises_and_the_accounting(schedule, expected):
    engine, model, optimizer, _, criterion = private(noise_multiplier=2.0)
    scheduler = schedule(optimizer)
    x, y = dataset().tensors
    scales = []
    for _ in expected:
        train(model, optimizer, [(x, y)], criterion)
        scales.append(optimizer.noise_scales)
        scheduler.step()
    accounted = [sigma for sigma, _, steps in engine.accountant.history for _ in range(steps)]
    assert accounted == expected
    for noise, sigma in zip(scales, expected, strict=True):
        assert noise.gradient**-2 + noise.direction**-2 + 2 * (2 * noise.count) ** -2 == (
            pytest.approx(sigma**-2)
        )


def test_the_accountant_is_told_before_anything_is_released():
    """A hook that raises stops the step: parameters and public state are as they were."""
    _, model, optimizer, _, criterion = private(accountant="gdp")
    x, y = dataset().tensors
    train(model, optimizer, [(x, y)], criterion)
    optimizer.noise_multiplier = 5.0  # GDP's accountant refuses a change
    before, state = parameters_of(model), optimizer.public_state
    with pytest.raises(ValueError, match="have to stay constant"):
        train(model, optimizer, [(x, y)], criterion)
    assert_same(parameters_of(model), before)
    assert optimizer.public_state is state


def test_secure_mode_is_opacus_own():
    try:
        import torchcsprng  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="torchcsprng"):
            IRWPrivacyEngine(secure_mode=True)
    else:
        assert IRWPrivacyEngine(secure_mode=True).secure_rng is not None


# Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction_share", [0.1, 0.0])
def test_resuming_from_opacus_checkpoint_is_exact(direction_share):
    config = IRWDPConfig(init_threshold=math.log(CLASSES), direction_share=direction_share)
    x, y = dataset().tensors
    batches = [(x[i::4], y[i::4]) for i in range(4)]

    engine, model, optimizer, _, criterion = private(irw=config)
    train(model, optimizer, batches[:2], criterion)
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    noise_state = optimizer.generator.get_state()
    train(model, optimizer, batches[2:], criterion)

    file.seek(0)
    again = private(irw=config, seed=99)
    again[0].load_checkpoint(path=file, module=again[1], optimizer=again[2])
    again[2].generator.set_state(noise_state)
    train(again[1], again[2], batches[2:], again[4])

    for a, b in zip(parameters_of(model), parameters_of(again[1]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(state_tensors(optimizer), state_tensors(again[2]), strict=True):
        assert torch.equal(a, b)
    assert optimizer.public_state.steps == again[2].public_state.steps
    assert engine.accountant.history == again[0].accountant.history


def test_a_checkpoint_loads_with_weights_only_and_holds_no_noise():
    _, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved) == {"state", "param_groups", "irw_dp"}
    assert set(saved["irw_dp"]) == {"config", "threshold", "scale", "steps", "direction"}


def test_loading_does_not_tie_the_state_to_the_checkpoint():
    _, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    for v in saved["irw_dp"]["direction"]:
        v.zero_()
    assert all(v.abs().sum() > 0 for v in optimizer.public_state.direction.values())


def test_a_checkpoint_of_another_optimizer_is_refused():
    _, model, optimizer, _, _ = private()
    plain = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="no 'irw_dp' entry"):
        optimizer.load_state_dict(plain)
    other = private(irw=IRWDPConfig(init_threshold=2.0, floor=0.3))[2].state_dict()
    with pytest.raises(ValueError, match=r"init_threshold=1.09.* here, 2.0 saved; floor=0.0 here"):
        optimizer.load_state_dict(other)
    wrong = optimizer.state_dict()
    wrong["irw_dp"]["direction"] = [torch.zeros(1)] * 4
    with pytest.raises(ValueError, match="shapes"):
        optimizer.load_state_dict(wrong)
    assert optimizer.public_state.steps == 0


@pytest.mark.parametrize("copy_it", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_are_refused_and_leave_opacus_intact(copy_it):
    """A failed deepcopy of a DPOptimizer patches its class for the whole process."""
    _, _, optimizer, _, _ = private()
    step = IRWDPOptimizer.step
    with pytest.raises(TypeError, match="cannot be copied"):
        copy_it(optimizer)
    assert IRWDPOptimizer.step is step
