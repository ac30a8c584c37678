"""From a vector of losses to ``p.grad``: one autograd node, behind which weights are chosen.

No optimizer, no process and no privacy is known here: all of them stand on this.
"""
