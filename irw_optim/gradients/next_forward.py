"""What is done about a model that went row by row: its next forward is another, if one is known.

Compiled code hides its operations, and cuDNN's recurrent kernels have no second derivative. Without
them the graph has what changes go forwards through.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from irw_optim.attachments import Attachment
from irw_optim.gradients import texts
from irw_optim.gradients.compiling import keep_out, keep_out_around
from irw_optim.gradients.hooks import silence_of
from irw_optim.gradients.recurrent import IN_CUDNN, without_cudnn

if TYPE_CHECKING:
    from irw_optim.gradients.engine import Engine

AROUND = "kept out around what is not covered"
"""What is known of an engine that has tried it."""


def goes_forwards_next(engine: Engine, model: nn.Module) -> bool:
    """Whether the next forward of the engine's model is another, after what is done here."""
    if engine.made_anew:
        engine.made_anew = False
    elif engine.sees_fused and (around := _around_uncovered(engine, model)):
        engine.hooks = [*(engine.hooks or ()), *around]
        engine.tell(logging.INFO, "kept out around", texts.KEPT_OUT_AROUND)
    elif engine.sees_fused:
        engine.hooks, engine.has_layer_hooks = [*silence_of(model), *keep_out(model)], False
        engine.tell(logging.WARNING, "kept out", texts.KEPT_OUT)
    elif engine.known.pop(IN_CUDNN, False) and (layers := without_cudnn(model)):
        engine.hooks = [*(engine.hooks or ()), *layers]
        engine.tell(logging.INFO, "cuDNN", texts.WITHOUT_CUDNN)
    else:
        return False
    return True


def _around_uncovered(engine: Engine, model: nn.Module) -> list[Attachment]:
    """Keeps the modules around parameters without quick products out, the first time."""
    if engine.known.get(AROUND):
        return []
    engine.known[AROUND] = True
    trained = {p for p in model.parameters() if p.requires_grad}
    for covering in reversed(engine.coverings.values()):  # the last graph of a new kind
        return keep_out_around(model, trained - covering.covered)
    return []
