"""What the log says once for a model, where it takes more than a line."""

from __future__ import annotations

ROWS_AS_THEY_ARE = (
    "Opacus' rows are taken as they are: only a forward that does not mix the samples "
    "of a batch has exact ones, and losses without their graph do not show it; "
    "irw_optim.verify(model, ...) on the plain model does"
)

RECOMPUTED = (
    "activation checkpointing: scores are pushed forward, exact and in the memory of the plain "
    'step, for about two and a half of its time; engine="ghost" takes the products instead, in '
    "one and a half of its time, and in the memory of a step without checkpointing"
)


def many_losses(count: int) -> str:
    """Of losses that lead through one graph, such as those of time steps."""
    return (
        f"{count} losses lead through one graph, such as those of time steps: "
        "each is a batch of its own, with its own worst-off samples and weights, and goes "
        "back through all of the graph, so that the cost is quadratic in their number. For "
        "one batch of sequences, in one backward pass, add up the losses of each sample: "
        "optimizer.backward(torch.stack(losses).mean(0)) with losses of shape (B,) from "
        'reduction="none"'
    )


def rows_may_meet(where: str) -> str:
    """Of rows that somebody else made, in a forward that may mix the samples."""
    return (
        f"samples may meet in the forward (at {where}), and then Opacus' rows are not the "
        "gradients of single losses: irw_optim.verify(model, ...) on the plain model "
        "tells; IRWOptimizer(..., model=model, criterion=criterion) is exact there, too"
    )


def parts(losses: int, rows: int) -> str:
    """Of losses that are parts of what entered the model."""
    return (
        f"{losses} losses come from {rows} rows that entered the model: each loss counts "
        "as a sample of its own, as a token does where a language model's loss is "
        "flattened. "
        f"For {rows} sequences, call optimizer.backward(losses) with losses of shape "
        f'({rows},): criterion(logits, targets) with reduction="none", then '
        f".view({rows}, -1).mean(1)"
    )


KEPT_OUT = (
    "torch.compile leaves this model alone from now on: what it fuses has parameters without quick "
    "products, and would take one backward pass a sample. Uncompiled, the graph shows how they are "
    "used. See 'torch.compile' in the documentation of models"
)

KEPT_OUT_AROUND = (
    "torch.compile leaves the modules alone in which parameters have no quick products; what these "
    "modules call is still compiled"
)

WITHOUT_CUDNN = (
    "recurrent layers take torch's own kernels from now on, through which changes go forwards: the "
    "gradient of cuDNN's cannot be differentiated, and would take one backward pass a sample"
)
