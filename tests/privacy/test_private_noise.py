"""The four noises: their size, their source, and what they are put on."""

import pytest
import torch
from private_zoo import setting
from torch.optim.lr_scheduler import StepLR

from irw_optim.privacy import DPGuaranteeError

RUNS = 400


@pytest.mark.parametrize("secure_mode", [False, True])
def test_each_noise_has_its_standard_deviation(secure_mode):
    sigma, C = 1.7, 0.6
    s = setting("mlp", noise_multiplier=sigma, max_grad_norm=C, secure_mode=secure_mode, lr=0.0)
    drawn = {"gradient": [], "direction": [], "tail": [], "saturated": []}
    for _ in range(RUNS):
        s.optimizer.step(losses=torch.zeros(0))
        release = s.optimizer.last_release
        B = s.optimizer.expected_batch_size
        drawn["gradient"] += [p.grad.flatten() * B for p in s.optimizer.params]
        drawn["direction"] += [t.flatten() for t in release.direction.values()]
        drawn["tail"].append(torch.tensor([release.tail_count]))
        drawn["saturated"].append(torch.tensor([release.saturated_count]))
        s.optimizer.zero_grad()
    expected = {  # r_g = .89, r_v = .1, r_b = .005
        "gradient": sigma / 0.89**0.5 * C,
        "direction": sigma / 0.1**0.5 * C,
        "tail": 0.5 * sigma / 0.005**0.5,
        "saturated": 0.5 * sigma / 0.005**0.5,
    }
    for name, samples in drawn.items():
        noise = torch.cat(samples)
        # Five standard errors of a standard deviation: fails by chance once in a million.
        error = 5 / (2 * len(noise)) ** 0.5
        assert noise.std().item() == pytest.approx(expected[name], rel=error), name
        assert abs(noise.mean().item()) < 5 * expected[name] / len(noise) ** 0.5, name


def test_all_noise_comes_from_the_given_generator():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        s = setting("mlp", noise_multiplier=1.0, generator=generator)
        state_of_default = torch.get_rng_state()
        s.backward()
        s.optimizer.step()
        assert torch.equal(torch.get_rng_state(), state_of_default)
        release = s.optimizer.last_release
        return [
            *(p.grad for p in s.optimizer.params),
            *release.direction.values(),
            torch.tensor([release.tail_count, release.saturated_count]),
        ]

    first, again, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_without_noise_the_gradient_is_the_weighted_clipped_sum():
    """Against a loop of plain autograd over the samples."""
    s = setting("mlp", max_grad_norm=0.5)
    s.backward()
    s.optimizer.step()  # the first step warms up and gives a direction
    s.optimizer.zero_grad()
    state = s.optimizer.public_state

    parameters = list(s.model.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    tail_sum = [torch.zeros_like(p) for p in parameters]
    C = 0.5
    s.model.disable_hooks()
    for i in range(len(s.x)):
        loss = torch.nn.functional.cross_entropy(s.model(s.x[i : i + 1]), s.y[i : i + 1])
        g = torch.autograd.grad(loss, parameters)
        norm = sum(t.square().sum() for t in g).sqrt().item()
        clip = min(1.0, C / (norm + 1e-6))
        alignment = sum((t * state.direction[p]).sum() for t, p in zip(g, parameters, strict=True))
        ramp = min(1.0, max(0.0, clip * alignment.item() / C / state.scale))
        tail = float(loss.item() > state.threshold)
        for total, tail_total, t in zip(expected, tail_sum, g, strict=True):
            total += max(tail, ramp) * clip * t
            tail_total += tail * clip * t
    s.model.enable_hooks()

    s.backward()
    s.optimizer.step()
    for p, total, tail_total in zip(parameters, expected, tail_sum, strict=True):
        torch.testing.assert_close(p.grad, total / len(s.x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            s.optimizer.last_release.direction[p], tail_total, rtol=1e-9, atol=1e-12
        )


def test_sum_reduction_is_not_divided_by_the_batch_size():
    mean = setting("mlp")
    total = setting("mlp", criterion=torch.nn.CrossEntropyLoss(reduction="sum"))
    for s in (mean, total):
        s.backward()
        s.optimizer.step()
    for p, q in zip(mean.model.parameters(), total.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad * len(mean.x), q.grad)


def test_learning_rate_schedulers_reach_the_inner_optimizer():
    s = setting("mlp")
    scheduler = StepLR(s.optimizer, step_size=1, gamma=0.5)
    s.backward()
    s.optimizer.step()
    scheduler.step()
    assert s.optimizer.original_optimizer.param_groups[0]["lr"] == 0.05


def test_nothing_of_a_single_sample_is_exposed():
    """No attribute of the optimizer is as long as the batch, after a step."""
    s = setting("mlp", n=7, noise_multiplier=1.0)
    s.backward()
    s.optimizer.step()
    public = {
        name: getattr(s.optimizer, name)
        for name in dir(s.optimizer)
        if not name.startswith("_") and name != "grad_samples"
    }
    lengths = {
        name: len(value) for name, value in public.items() if isinstance(value, torch.Tensor | list)
    }
    assert 7 not in lengths.values(), lengths
    with pytest.raises(DPGuaranteeError, match="losses are missing"):
        s.optimizer.pending.losses()
