"""From a vector of losses to ``p.grad``: one autograd node, behind which weights are chosen.

`weighted_loss` makes the scalar that a training loop sees and `weigher` says who decides; passes
that are weighed together wait in `accumulation`. No optimizer, no process and no privacy is known
here: all of them stand on this.
"""
