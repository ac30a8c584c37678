"""What is done about a model that went row by row: its next forward is another, if one is known.

Compiled code hides its operations, and cuDNN's recurrent kernels have no second derivative. Without
them the graph has what changes go forwards through.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from irw_optim.gradients import texts
from irw_optim.gradients.compiling import keep_out
from irw_optim.gradients.hooks import silence_of
from irw_optim.gradients.recurrent import IN_CUDNN, without_cudnn

if TYPE_CHECKING:
    from irw_optim.gradients.engine import Engine


def goes_forwards_next(engine: Engine, model: nn.Module) -> bool:
    """Whether the next forward of the engine's model is another, after what is done here."""
    if engine.made_anew:
        engine.made_anew = False
    elif engine.sees_fused:
        engine.hooks, engine.has_layer_hooks = [*silence_of(model), *keep_out(model)], False
        engine.tell(logging.WARNING, "kept out", texts.KEPT_OUT)
    elif engine.known.pop(IN_CUDNN, False) and (layers := without_cudnn(model)):
        engine.hooks = [*(engine.hooks or ()), *layers]
        engine.tell(logging.INFO, "cuDNN", texts.WITHOUT_CUDNN)
    else:
        return False
    return True
