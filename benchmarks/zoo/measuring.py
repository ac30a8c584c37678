"""Time and peak memory of an IRW step over those of a plain step, in one process.

Time: that of the processor in this process, so that others on the machine do not count; both steps
in turns, pair by pair, the ratio of their medians. Nine steps come first, so that the checks of the
library at uses 1, 2, 4 and 8 are past; those at 16, 32, ... fall into the pairs, and what is
checked at every step does, too.

Memory: the most bytes of tensors alive at once during a step, one without a check. Both numbers
include parameters, buffers, the batch, the gradients and all activations; SGD has no state.
"""

from dataclasses import dataclass
from statistics import median
from time import process_time

import torch
from torch import Tensor, nn

from benchmarks.cost.neighbours import ALPHA
from benchmarks.cost.steps import in_turns
from benchmarks.zoo.entry import Batch, Entry
from irw_optim import IRWOptimizer
from irw_optim.model_check import peak_bytes

WARM_UP = 9
FEWEST, MOST = 7, 1000


@dataclass(frozen=True)
class Loop:
    """A model with its optimizer, and a training step of it; plain without alpha."""

    entry: Entry
    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer
    criterion: nn.Module

    @classmethod
    def of(cls, entry: Entry, model: nn.Module, batch: Batch, alpha: float | None) -> "Loop":
        inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        criterion = nn.CrossEntropyLoss()
        if alpha is None:
            return cls(entry, model, batch, inner, criterion)
        attached = criterion if entry.losses is None else None
        optimizer = IRWOptimizer(inner, alpha=alpha, model=model, criterion=attached)
        return cls(entry, model, batch, optimizer, criterion)

    def backward(self) -> None:
        """The gradient of one batch, plain or weighted."""
        inputs, target = self.batch
        self.optimizer.zero_grad()
        output = self.model(*inputs)
        if self.entry.losses is None:
            self.criterion(output, target).backward()
            return
        losses = self.entry.losses(output, target)
        if isinstance(self.optimizer, IRWOptimizer):
            self.optimizer.backward(losses)
        else:
            losses.mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


def cost(entry: Entry, size: int, seconds: float) -> dict[str, float | str | bool]:
    """What one entry costs at one batch size, by so many seconds of pairs of steps."""
    batch = entry.draw(size)
    plain, ours = (Loop.of(entry, entry.make(), batch, alpha) for alpha in (None, ALPHA))
    for _ in range(WARM_UP):
        ours.step()
    held = _held(plain.model, batch)
    memory = [held + peak_bytes(loop.step, "cpu") for loop in (plain, ours)]
    pairs, end = [], process_time() + seconds
    for pair in in_turns((plain.step, ours.step)):
        pairs.append(pair)
        if len(pairs) > FEWEST and (len(pairs) >= MOST or process_time() >= end):
            break
    times = [median(taken) for taken in zip(*pairs[1:], strict=True)]
    return {
        "size": size,
        "milliseconds": times[0] * 1e3,
        "time": times[1] / times[0],
        "megabytes": memory[0] / 1e6,
        "memory": memory[1] / memory[0],
        "pairs": len(pairs) - 1,
        "path": path_of(ours.optimizer),
        "batch_norm": any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.model.modules()
        ),
    }


def path_of(optimizer: IRWOptimizer) -> str:
    """The way that the engine took, in words for the table."""
    engine = optimizer.engine
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    covered = {p for covering in engine.coverings.values() for p in covering.covered}
    rest = "row by row" if engine.known.get("row_by_row") else "forwards"
    if engine.coverings and all(covering.covers_all for covering in engine.coverings.values()):
        return "quick"
    share = sum(p.numel() for p in trained if p in covered) / sum(p.numel() for p in trained)
    rounded_down = int(share * 1000) / 10  # since what is not covered decides the cost
    return f"quick for {rounded_down:g} %, {rest}" if covered else rest


def _held(model: nn.Module, batch: Batch) -> int:
    """Bytes that stay from step to step."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers(), *batch[0], batch[1]]
    return sum(t.numel() * t.element_size() for t in tensors)
