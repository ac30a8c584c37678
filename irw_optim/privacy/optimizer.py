"""DP-IRW as a DPOptimizer: the state around the pure functions of ``mechanism``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _generate_noise, _mark_as_processed
from torch import Tensor
from torch.optim import Optimizer

from irw_optim.errors import DPGuaranteeError

from ..arguments import as_real
from . import refusals
from .config import IRWDPConfig
from .mechanism import (
    NoiseScales,
    PublicState,
    Released,
    SampleTerms,
    dump,
    next_state,
    noise_scales,
    restore,
    sample_terms,
)
from .pending import ClippableGradients, PendingBatch


@dataclass
class _Sums:
    """The four sums over the samples so far, without noise: private."""

    gradient: dict[Tensor, Tensor]
    direction: dict[Tensor, Tensor]
    tail_count: Tensor
    saturated_count: Tensor

    def add(self, other: _Sums) -> None:
        for p, total in self.gradient.items():
            total += other.gradient[p]
        for p, total in self.direction.items():
            total += other.direction[p]
        self.tail_count += other.tail_count
        self.saturated_count += other.saturated_count


class IRWDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Differentially private IRW around any torch optimizer, in place of Opacus' DPOptimizer.

    `IRWPrivacyEngine.make_private` builds it. A step releases four noisy sums (formulas in
    ``irw_optim.privacy.mechanism``), together one sampled Gaussian mechanism with multiplier
    `noise_multiplier`, which is what Opacus' accountants are told.

    Args:
        optimizer: the optimizer that takes the noisy gradient.
        irw: the parameters of DP-IRW.
        noise_multiplier: sigma of the whole step; noise schedulers may move it.
        max_grad_norm: C, the norm to which each sample's gradient is clipped.
        expected_batch_size: B = sampling rate times N.
        loss_reduction: "mean" divides the noisy gradient by B, "sum" does not.
        generator: source of all noise; None is torch's default one.
        secure_mode: use Opacus' noise that resists floating-point attacks.

    Raises:
        DPGuaranteeError: an optimizer that would see gradients without noise, or an option that
            weighs samples by one another.
        ValueError: a value outside its range.
        NotImplementedError: an optimizer whose step needs a closure.

    Example:
        >>> from opacus import GradSampleModule
        >>> model = GradSampleModule(torch.nn.Linear(2, 1), loss_reduction="mean")
        >>> optimizer = IRWDPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), irw=IRWDPConfig(init_threshold=1.0),
        ...     noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4,
        ... )
        >>> losses = model(torch.ones(4, 2)).square().squeeze(1)
        >>> losses.mean().backward()
        >>> optimizer.step(losses=losses)
        >>> optimizer.zero_grad()
        >>> optimizer.public_state.steps
        1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        irw: IRWDPConfig,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        **unknown: Any,
    ) -> None:
        refusals.refuse_options(unknown, of=IRWDPOptimizer)
        sigma, bound = refusals.check_mechanism(
            irw, optimizer, noise_multiplier, max_grad_norm, loss_reduction
        )
        size = as_real(
            expected_batch_size
        )  # known, as the actual one of a Poisson batch is private
        if size is None or not 0 < size < math.inf:
            raise ValueError(
                f"expected_batch_size={expected_batch_size!r}: expected a positive number, the "
                "sampling rate times the number of samples"
            )
        super().__init__(
            optimizer,
            noise_multiplier=sigma,
            max_grad_norm=bound,
            expected_batch_size=size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
        )
        self.irw = irw
        self.pending = PendingBatch(loss_reduction)
        self._public_state = PublicState.initial(irw)
        self._last_release: Released | None = None
        self._logical_batch: _Sums | None = None  # while it goes on

    @property
    def public_state(self) -> PublicState:
        """Threshold, scale, direction and step count: functions of noisy releases, public."""
        return self._public_state

    @property
    def last_release(self) -> Released | None:
        """The noisy counts and the noisy direction of the last step: public."""
        return self._last_release

    @property
    def noise_scales(self) -> NoiseScales:
        """The noise of the single releases at the present `noise_multiplier`."""
        return noise_scales(self.noise_multiplier, self.irw)

    accumulated_iterations = 1
    """One Poisson batch a step, whatever its physical batches; read by accountants."""

    def step(self, closure: Any = None, *, losses: Tensor | None = None) -> float | None:
        """Clip, weigh, sum, and at the end of a logical batch add noise, account and step.

        Args:
            closure: not supported.
            losses: per-sample losses (B,) of the physical batch just gone backward; not needed
                where a criterion was given to `make_private`. A batch of no samples needs no
                backward pass: ``step(losses=torch.zeros(0))``.

        Raises:
            NotImplementedError: a closure is given.
            DPGuaranteeError: losses missing or not one per sample; gradients accumulated, or
                stepped on twice. Nothing has changed then.
        """
        if closure is not None:
            raise NotImplementedError(
                "closure: a closure takes several looks at a batch for one step's privacy budget; "
                "call backward and then step()"
            )
        if self.pre_step(losses=losses):
            return self.original_optimizer.step()  # type: ignore[no-any-return]
        return None

    def pre_step(self, closure: Any = None, *, losses: Tensor | None = None) -> bool:
        """All of a step but the inner one's; False while the logical batch goes on."""
        losses = self.pending.losses(losses)
        rows = self.pending.rows(self.params, len(losses))
        sums = self._sums(rows, self._weigh(losses, rows))
        self.pending.clear()
        for p in self.params:
            _mark_as_processed(getattr(p, "grad_sample", None))
        if self._logical_batch is not None:
            self._logical_batch.add(sums)
            sums = self._logical_batch
        self._is_last_step_skipped = self._check_skip_next_step()
        self._logical_batch = sums if self._is_last_step_skipped else None
        if self._is_last_step_skipped:
            return False
        released = self._release(sums)
        if self.step_hook:
            self.step_hook(self)  # account before anything can be learnt from the release
        self._public_state = next_state(
            self._public_state,
            released,
            self.irw,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
        )
        self._last_release = released
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and their losses; the sums of an unfinished logical batch stay."""
        self.pending.clear()
        super().zero_grad(set_to_none)

    def discard_batch(self) -> None:
        """Forget an unfinished logical batch, after a loop that broke off: nothing was released."""
        self._logical_batch, self._is_last_step_skipped = None, False
        self._step_skip_queue.clear()
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and, under ``"irw_dp"``, the public state.

        Raises:
            DPGuaranteeError: in the middle of a logical batch, whose sums are private.
        """
        self._refuse_mid_batch("state_dict()")
        public = dump(self._public_state, self.irw, self._all_parameters)
        return {**self.original_optimizer.state_dict(), "irw_dp": public}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken.

        Raises:
            DPGuaranteeError: in the middle of a logical batch.
            ValueError: a checkpoint of another optimizer, or of other DP-IRW parameters.
        """
        self._refuse_mid_batch("load_state_dict()")
        inner = dict(state_dict)
        saved = inner.pop("irw_dp", None)
        public = restore(saved, self.irw, self._all_parameters)
        self.original_optimizer.load_state_dict(inner)
        self._public_state = public

    def detach(self) -> None:
        """Leave criterion and model as they were; `make_private` may then take them again."""
        self.pending.unfollow()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: they would share the noise, and break Opacus' class on the way."""
        raise TypeError(
            "an IRWDPOptimizer cannot be copied or pickled: save its state_dict() instead"
        )

    @property
    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _weigh(self, losses: Tensor, rows: ClippableGradients) -> SampleTerms:
        norms, state = rows.norms(), self._public_state
        products = rows.dot(state.direction).to(norms)
        return sample_terms(losses.to(norms), norms, products, state, self.irw, self.max_grad_norm)

    def _sums(self, rows: ClippableGradients, terms: SampleTerms) -> _Sums:
        dropped = terms.counted == 0
        if dropped.any():
            rows = rows.without(dropped)
        return _Sums(
            gradient=self._sum(rows, terms.clip * terms.weights),
            direction=self._sum(rows, terms.clip * terms.tail) if self.irw.uses_direction else {},
            tail_count=terms.tail_count,
            saturated_count=terms.saturated_count,
        )

    def _sum(self, rows: ClippableGradients, weights: Tensor) -> dict[Tensor, Tensor]:
        """Sum of w_i g_i for every parameter, zero where the losses do not depend on it."""
        total = rows.combine(weights)
        return {p: total[p] if p in total else torch.zeros_like(p) for p in self.params}

    def _release(self, sums: _Sums) -> Released:
        """Noise on the four sums; the gradient goes to ``p.grad``, ready for the inner step."""
        scales, C = self.noise_scales, self.max_grad_norm
        for p, total in sums.gradient.items():
            p.grad = self._noisy(total, scales.gradient * C).view_as(p).to(p.dtype)
        self.scale_grad()
        tail_count = self._noisy(sums.tail_count, scales.count)
        if not self.irw.uses_direction:
            return Released(tail_count.item())
        saturated_count = self._noisy(sums.saturated_count, scales.count)
        tail, saturated = torch.stack([tail_count, saturated_count]).tolist()
        direction = {p: self._noisy(t, scales.direction * C) for p, t in sums.direction.items()}
        return Released(tail, saturated, direction)

    def _noisy(self, total: Tensor, std: float) -> Tensor:
        return total + self._noise(std, total)

    def _noise(self, std: float, like: Tensor) -> Tensor:
        noise: Tensor = _generate_noise(
            std=std, reference=like, generator=self.generator, secure_mode=self.secure_mode
        )
        return noise

    def _refuse_mid_batch(self, what: str) -> None:
        if self._logical_batch is not None:
            raise DPGuaranteeError(
                f"{what} in the middle of a logical batch: the sums so far have no noise yet. Call "
                "it after the step that ends the batch, or discard_batch() if the loop broke off"
            )
