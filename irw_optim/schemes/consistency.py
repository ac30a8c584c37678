"""Notices where a sample's loss depends on who else is in its batch.

The weights of a data set are said to be the same for any batch size. They are, unless the forward
mixes the samples (``h - h.mean(0)``), pads them to the longest without a mask, or is given other
views of them in every pass. A sample is read two or three times, and each time in another batch,
so its losses need only be compared.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from irw_optim.schemes.eval_mode import warn_once

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Of the mean loss: far above what another kernel for another batch size rounds differently."""

_LOW_PRECISION = 0.1


class LossConsistency:
    """The losses of all samples as they were first seen, and how far any was off later.

    Args:
        size: N.

    Attributes:
        largest_difference: 0-dim.
        sample: the one that differed most, 0-dim.

    >>> consistency = LossConsistency(3)
    >>> consistency.note(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    >>> consistency.note(torch.tensor([1, 2]), torch.tensor([2.5, 4.0]))
    >>> consistency.largest_difference, consistency.sample
    (tensor(0.5000), tensor(1))
    """

    def __init__(self, size: int) -> None:
        self.largest_difference = torch.zeros((), device="cpu")
        self.sample = torch.zeros((), dtype=torch.int64, device="cpu")
        self._first_seen = torch.full((size,), torch.nan, device="cpu")
        self._batches: list[Tensor] = []

    def note(self, samples: Tensor, losses: Tensor) -> None:
        """Take the losses (b,) of these samples (b,), dataset indices on the CPU."""
        self._batches.append(samples)
        losses = forward_ad.unpack_dual(losses.detach()).primal
        self._first_seen = self._first_seen.to(losses)
        self.largest_difference = self.largest_difference.to(losses)
        samples = samples.to(losses.device)
        before = self._first_seen[samples]
        difference = (losses - before).abs().nan_to_num(0.0)  # nothing is known of some
        if len(samples):
            most, place = difference.max(0)
            is_more = most > self.largest_difference
            self.sample = torch.where(is_more, samples[place], self.sample.to(samples))
            self.largest_difference = self.largest_difference.maximum(most)
        self._first_seen[samples] = torch.where(before.isnan(), losses, before)

    def differing_batches(self, full_precision: bool) -> list[list[int]]:
        """The batches with the sample whose loss differed most, if it did so beyond rounding."""
        tolerance = _LOW_PRECISION
        if full_precision:
            tolerance = _TOLERANCE.get(self._first_seen.dtype, _LOW_PRECISION)
        scale = float(self._first_seen.nanmean())
        if not float(self.largest_difference) > tolerance * abs(scale):
            return []
        sample = int(self.sample)
        return [batch for batch in map(Tensor.tolist, self._batches) if sample in batch]

    def warn(self, model: nn.Module) -> None:
        """Say, once for a model, what that means for its weights."""
        warn_once(
            model,
            "a sample's loss differs by up to %.2g (the mean loss is %.2g) from one batch to "
            "another: the forward mixes the samples of a batch, pads them without a mask, or "
            "data set, collate_fn or model draw at random. The weights depend on the batch "
            "size, on the order of the data set or on the draws; use a model in which each "
            "sample stands for itself, and leave random augmentation out of the scoring",
            float(self.largest_difference),
            float(self._first_seen.nanmean()),
        )
