"""How a change of an operation's inputs changes its outputs, from what it saved for autograd.

A rule for each of the operations that models spend their time in, by the name of its node. It gets
the node and a change for each input (None for none), and gives that of the output, of whatever
shape and type broadcast to it. None stands for "not by this rule": then the node's own derivative
is taken.

What is recomputed (checkpointing) is handed out once in a pass. So a rule decides first whether it
applies, and then reads every ``_saved_`` tensor once.
"""

from irw_optim.gradients.forward import _fused, _layers, _plain
from irw_optim.gradients.forward._plain import (
    RESHAPED,
    by_pull,
    diagonal,
    of_single_losses,
    reshaped,
)
from irw_optim.gradients.forward._tangents import Changes, ForwardRule, Tangents, transposed

__all__ = [
    "FORWARD",
    "RESHAPED",
    "Changes",
    "ForwardRule",
    "Tangents",
    "by_pull",
    "diagonal",
    "of_single_losses",
    "reshaped",
    "transposed",
]

FORWARD: dict[str, ForwardRule] = {
    name: rule
    for rules in (_plain.RULES, _layers.RULES, _fused.RULES)
    for names, rule in rules.items()
    for name in names.split()
}
"""The rules by the names of operations, without ``Backward0``."""
