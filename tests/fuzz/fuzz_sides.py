"""What a training loop holds, and its two sides: with the library here, the loop in `fuzz_oracle`.

A loop is a function of a `User` and a batch, written as users write it: it calls networks, the
criterion, `backward` and ``torch.autograd.grad`` in whatever pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from irw_optim import IRWOptimizer


class User:
    """What a training loop holds.

    Attributes:
        world: all networks; ``world.model`` is the one that the optimizer wraps.
        criterion: called with outputs and targets; returns a scalar loss.
        owned: the parameters that the optimizer has.
        other: a second optimizer and its criterion, on the same model.
        noted: what the loop found, to be compared: gradients it took, values it saw.
        measuring: whether the backward pass that runs is one of the oracle's own.
    """

    measuring = False

    criterion: Callable[..., Tensor]

    def __init__(self, world: nn.Module) -> None:
        self.world = world
        self.net: Any = world.model
        self.noted: list[tuple[str, Tensor]] = []
        self.owned: list[Tensor] = []
        self.other: Any = None
        self.stepped = False

    def begin(self) -> None:
        """A new step."""
        self.noted.clear()
        self.stepped = False
        self.zero_grad()

    def note(self, name: str, value: Tensor | float) -> None:
        """Notes a value, or a gradient: its name begins with "d "."""
        self.noted.append((name, torch.as_tensor(value).detach().clone()))

    def note_gradients(self, net: nn.Module) -> None:
        for name, p in net.named_parameters():
            self.note(f"d {name}", torch.zeros_like(p) if p.grad is None else p.grad)

    def backward(self, loss: Tensor, **how: Any) -> None:
        loss.backward(**how)

    def of_each(self, losses: Tensor) -> None:
        """Backpropagates per-sample losses, (B,), in place of ``loss.backward()``."""
        raise NotImplementedError

    def zero_grad(self, **how: Any) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """The gradient of a logical batch that had fewer passes."""
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError


class Ours(User):
    """With the library."""

    def __init__(self, world, criterion, owned, lr: float, **options) -> None:
        super().__init__(world)
        self.criterion, self.owned = criterion, owned
        inner = torch.optim.SGD(owned, lr=lr)
        self.optimizer = IRWOptimizer(inner, model=world.model, criterion=criterion, **options)

    def of_each(self, losses: Tensor) -> None:
        self.optimizer.backward(losses)

    def zero_grad(self, **how: Any) -> None:
        self.optimizer.zero_grad(**how)

    def finish(self) -> None:
        self.optimizer.finish()

    def step(self) -> None:
        self.optimizer.step()
        self.stepped = True
