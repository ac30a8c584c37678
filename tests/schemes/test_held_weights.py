"""Held weights in several processes: refused by name where they would be another batch's."""

from __future__ import annotations

import pytest

from irw_optim.schemes.held_weights import HeldWeights


def test_reweighting_over_ranks_is_refused():
    with pytest.raises(NotImplementedError, match="under DistributedDataParallel is not built"):
        HeldWeights(resampled=False).over_ranks(None)


def test_resampled_batches_are_averaged_over_ranks():
    held = HeldWeights(resampled=True)
    assert held.over_ranks(None) is held
