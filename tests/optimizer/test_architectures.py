"""Real architectures train twenty steps with the one line, each step equal to the loop's."""

import pytest
import torch
from architectures import ARCHITECTURES
from reference import step as reference_step

from irw_optim import IRWOptimizer, per_sample_losses, verify

STEPS, ALPHA = 20, 0.3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twenty_steps_are_the_steps_of_the_loop(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.model().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    criterion = torch.nn.CrossEntropyLoss()
    inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model, criterion=criterion)
    buffers = dict(model.named_buffers())
    for step in range(STEPS):
        x, y = architecture.inputs(), architecture.targets()
        x = x.double() if x.is_floating_point() else x
        saved = {name: buffer.clone() for name, buffer in buffers.items()}
        torch.manual_seed(step)
        truth = reference_step(per_sample_losses(criterion, model(x), y).losses, parameters, ALPHA)
        for key, buffer in buffers.items():
            buffer.copy_(saved[key])
        torch.manual_seed(step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        torch.testing.assert_close(optimizer.last_step.weights, truth.weights, rtol=1e-7, atol=1e-9)
        for parameter, expected in zip(parameters, truth.gradients, strict=True):
            found = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        optimizer.step()


@pytest.mark.parametrize(
    "name", ["U-Net, loss per pixel", "tabular transformer", "BERT", "GPT-2", "ViT"]
)
def test_needs_no_autodiff(name: str) -> None:
    """Layer by layer the quick products suffice, fused attention and class tokens included."""
    architecture = ARCHITECTURES[name]
    report = verify(
        architecture.model(),
        architecture.inputs(),
        architecture.targets(),
        torch.nn.CrossEntropyLoss(),
    )
    assert report.exact, str(report)
    assert set(report.engines.values()) == {"ghost"}, str(report)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verify_says_that_it_is_exact_and_leaves_everything_as_it_was(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, x, y = architecture.model(), architecture.inputs(), architecture.targets()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = verify(model, x, y, torch.nn.CrossEntropyLoss())
    assert report.exact, str(report)
    assert "EXACT" in str(report)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
