"""Held weights in several processes, of what one process can see; the rest runs in several."""

from __future__ import annotations

from irw_optim.schemes.weighing import HeldWeights


def test_resampled_batches_are_averaged_over_ranks():
    held = HeldWeights(resampled=True)
    assert held.over_ranks(None) is held
