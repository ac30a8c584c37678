"""How a training loop gets the weights: a torch optimizer around any torch optimizer."""

from .irw_optimizer import IRWOptimizer

__all__ = ["IRWOptimizer"]
