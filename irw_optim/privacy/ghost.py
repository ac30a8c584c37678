"""Ghost mode: the same mechanism with no B x P tensor.

The layers' inputs and output gradients give the norms to clip by, <g_i, v> for the weights, and the
two weighted sums. One backward pass to the layers' outputs is all; gradients without noise never
reach ``p.grad``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from irw_optim.backward.weighted_loss import Deferred, deferred_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.layers import FIRST
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.torch_internals import will_run

from .pending import ClippableGradients, GhostRows, GradSampleRows, PendingBatch


class GhostBatch(PendingBatch):
    """A pending batch whose rows are ghost products; row i is the gradient of loss i."""

    def __init__(self, loss_reduction: str, model: nn.Module) -> None:
        super().__init__(loss_reduction)
        self._engine = Engine(model, "auto")
        self._engine.add_layer_hooks()  # a batch of one sample does not show where the batch is

    def unfollow(self) -> None:
        """Leave the criterion and the model as they were."""
        super().unfollow()
        self._engine.remove_hooks()

    def rows(self, parameters: Sequence[Tensor], batch_size: int) -> ClippableGradients:
        """The rows of the one backward pass, if it is that of the losses given."""
        rows: GhostRows | None = self._arrived[0][1] if len(self._arrived) == 1 else None
        if rows is None and batch_size == 0:
            return GradSampleRows.read(parameters, 0)
        if rows is None or rows.batch_size != batch_size:
            raise DPGuaranteeError(
                f"losses has {batch_size} samples, but {len(self._arrived)} backward passes ran "
                "since the last step, or one of another size: in ghost mode call the criterion "
                "that make_private was given, backward, and step() without losses"
            )
        return rows

    def _hand_out(self, batch: PerSampleLosses) -> Tensor:
        if not batch.losses.requires_grad:
            return batch.value
        captured = LossGradients(self._engine, batch.losses) if len(batch.losses) else None
        anchor = torch.zeros_like(batch.value, requires_grad=True)  # something to go backward to
        return deferred_loss(batch.value, _Arrival(self, batch.losses.detach(), captured), [anchor])

    def arrived(self, losses: Tensor, captured: LossGradients | None, upstream: Tensor) -> None:
        """Keep what a backward pass has brought; no rows are those of a batch of no samples."""
        self._arrived.append((losses, captured and self._rows_of(captured, upstream)))

    def _rows_of(self, captured: LossGradients, upstream: Tensor) -> GhostRows:
        """Run the engine behind a vector of losses; NotImplementedError where it does not cover."""
        if any(map(will_run, captured.graph.order)):
            raise NotImplementedError(
                "grad_sample_mode='ghost': another term of the loss uses the same outputs, and "
                "would not be clipped; put it into the criterion (a PerSampleLoss), or use "
                "grad_sample_mode='hooks'"
            )
        batch_size = len(captured.losses)
        captured.start(torch.ones_like(upstream), keep_graph=False)
        uncovered = set(captured.uncovered)
        for call, _, shape, _ in captured.graph.sites:
            # A folded batch, or one that does not stand first, must be proven by the graph: of a
            # Poisson batch's size a guess may be wrong, and would mix samples.
            first = shape[:1] == (batch_size,) and call.layout == FIRST
            if not (captured.apart and call.layout is not None) and not first:
                uncovered.update(call.parameters.values())
        if uncovered or captured.ghost is None:
            raise NotImplementedError(
                f"grad_sample_mode='ghost' does not cover {self._engine.names_of(uncovered)}: it "
                "takes layers that are linear in their parameters and keep the batch in dimension "
                "0, in a forward that does not mix samples; use grad_sample_mode='hooks'"
            )
        return GhostRows(captured.ghost.calls, batch_size, 1 / upstream)


class _Arrival(Deferred):
    """What happens when the backward pass arrives at the losses."""

    ALREADY_PASSED = "this loss went backward already: one backward pass, one step"
    ERROR = DPGuaranteeError

    def __init__(self, pending: GhostBatch, losses: Tensor, captured: LossGradients | None) -> None:
        self.captured = captured
        self.pending = weakref.ref(pending)  # the loss may outlive the training
        self.losses = losses

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Nothing goes on to the parameters: their gradient is made by the private step."""
        self.passed = True  # also where the graph is kept
        pending = self.pending()
        try:
            if pending is not None:  # else it is gone, with its optimizer
                pending.arrived(self.losses, self.captured, upstream)
        finally:
            self.leave()
        return [None]

    def leave(self) -> None:
        super().leave()
        self.captured = None
