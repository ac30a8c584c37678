"""From a vector of losses to ``p.grad``: one autograd node, behind which weights are chosen."""
