"""How a change of an operation's inputs changes its outputs, from what it saved for autograd.

A rule makes of a node and a change for each input that of the output, in a shape and type that
broadcast to it; of None, the node's own derivative is taken.

What is recomputed (checkpointing) is handed out once in a pass: a rule decides first whether it
applies, and then reads every ``_saved_`` tensor once.
"""

from . import _layers, _plain, _tangents

FORWARD: dict[str, _tangents.ForwardRule] = {
    name: rule
    for rules in (_plain.RULES, _layers.RULES, _tangents.RULES)
    for names, rule in rules.items()
    for name in names.split()
}
"""The rules by the names of operations, without ``Backward0``."""
