"""What the log says once for a model, where it takes more than a line."""

from __future__ import annotations

RECOMPUTED = (
    "activation checkpointing: scores are pushed forward, exact and in the memory of the plain "
    'step, for about two and a half of its time; engine="ghost" takes the products instead, in '
    "one and a half of its time, and in the memory of a step without checkpointing"
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
