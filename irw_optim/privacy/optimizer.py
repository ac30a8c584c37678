"""DP-IRW as a DPOptimizer: the state around the pure functions of ``mechanism``."""

from dataclasses import asdict
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _generate_noise, _mark_as_processed
from torch import Tensor
from torch.optim import Optimizer

from irw_optim.arguments import DPGuaranteeError, real_number

from . import mechanism, refusals
from .mechanism import IRWDPConfig, NoiseScales, PublicState, Released, SampleTerms
from .pending import ClippableGradients, PendingBatch

Sums = dict[str, dict[Any, Tensor]]  # gradient and direction by parameter, and the counts


class IRWDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Differentially private IRW around any torch optimizer, in place of Opacus' DPOptimizer.

    `IRWPrivacyEngine.make_private` builds it. A step releases four noisy sums (formulas in
    ``irw_optim.privacy.mechanism``), together one sampled Gaussian mechanism with multiplier
    `noise_multiplier`, which is what Opacus' accountants are told.

    Args:
        optimizer, irw, max_grad_norm: as of `make_private`, whose errors are raised.
        noise_multiplier: sigma of the whole step; noise schedulers may move it.
        expected_batch_size: B = sampling rate times N.
        loss_reduction: "mean" divides the noisy gradient by B, "sum" does not.
        generator: source of all noise; None is torch's default one.
        secure_mode: use Opacus' noise that resists floating-point attacks.

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

    public_state: PublicState
    """Threshold, scale, direction and step count, of noisy releases: public."""

    last_release: Released | None = None
    """The noisy counts and the noisy direction of the last step: public."""

    over_ranks = False
    """Whether a step is that of all ranks on their joined batch, with the noise of rank 0."""

    accumulated_iterations = 1
    """One Poisson batch a step; read by accountants."""

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
        # Known to all, unlike the size of the Poisson batch at hand.
        meaning = "the sampling rate times the number of samples"
        size = real_number("expected_batch_size", expected_batch_size, "(0, inf)", meaning)
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
        self.public_state = PublicState(irw.init_threshold, irw.init_scale)
        self._logical_batch: Sums | None = None  # while it goes on; without noise, so private

    @property
    def noise_scales(self) -> NoiseScales:
        """The noise of the releases at the present `noise_multiplier`."""
        return mechanism.noise_scales(self.noise_multiplier, self.irw)

    def step(self, closure: Any = None, *, losses: Tensor | None = None) -> float | None:
        """Clip, weigh, sum, and at the end of a logical batch add noise, account and step.

        Args:
            closure: not supported.
            losses: per-sample losses (B,) of the physical batch just gone backward, where
                `make_private` was given no criterion; of nobody ``torch.zeros(0)``.

        Raises:
            NotImplementedError: a closure is given.
            DPGuaranteeError: losses missing or not one per sample; gradients accumulated, or
                stepped on twice. Nothing has changed then.
        """
        if closure is not None:
            raise NotImplementedError(
                "closure: it looks at a batch more than once for one budget; call backward and "
                "then step()"
            )
        if self.pre_step(losses=losses):
            return self.original_optimizer.step()  # type: ignore[no-any-return]
        return None

    def pre_step(self, closure: Any = None, *, losses: Tensor | None = None) -> bool:
        """All of a step but the inner one's; False while the logical batch goes on."""
        losses = self.pending.losses(losses)
        rows = self.pending.rows(self.params, len(losses))
        sums = self._sums(rows, self._weigh(losses, rows))
        self.pending.arrived.clear()
        for p in self.params:
            _mark_as_processed(getattr(p, "grad_sample", None))
        for kind, totals in (self._logical_batch or {}).items():
            for key in totals.keys() & sums[kind]:  # some may be frozen
                sums[kind][key] += totals[key]
        self._is_last_step_skipped = self._check_skip_next_step()
        self._logical_batch = sums if self._is_last_step_skipped else None
        if self._is_last_step_skipped:
            return False
        released = self._release(sums)
        if self.step_hook:
            self.step_hook(self)  # account before anything can be learnt from the release
        self.public_state = mechanism.next_state(
            self.public_state,
            released,
            self.irw,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
        )
        self.last_release = released
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_grad_norm" and vars(self).get("_logical_batch"):
            self._refuse_mid_batch(f"max_grad_norm={value!r}")  # its noise would be too small
        super().__setattr__(name, value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and losses; the sums of an unfinished logical batch stay."""
        self.pending.arrived.clear()
        super().zero_grad(set_to_none)

    def discard_batch(self) -> None:
        """Forget an unfinished logical batch, of which nothing was released."""
        self._logical_batch, self._is_last_step_skipped = None, False
        self._step_skip_queue.clear()
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and, under ``"irw_dp"``, the public state.

        Raises:
            DPGuaranteeError: in the middle of a logical batch, whose sums are private.
        """
        self._refuse_mid_batch("state_dict()")
        direction = [self.public_state.direction.get(p) for p in self._all_parameters]
        public = {**vars(self.public_state), "config": asdict(self.irw), "direction": direction}
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
        refusals.check_checkpoint(saved, self.irw, self._all_parameters)
        self.original_optimizer.load_state_dict(inner)
        pairs = zip(self._all_parameters, saved["direction"], strict=True)
        direction = {p: v.to(device=p.device, copy=True) for p, v in pairs if v is not None}
        scalars = {name: saved[name] for name in ("threshold", "scale", "steps")}
        self.public_state = PublicState(direction=direction, **scalars)

    def detach(self) -> None:
        """Leave criterion and model as they were, for another `make_private`."""
        self.pending.unfollow()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: they would share the noise."""
        raise TypeError(
            "an IRWDPOptimizer cannot be copied or pickled: save its state_dict() instead"
        )

    @property
    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _weigh(self, losses: Tensor, rows: ClippableGradients) -> SampleTerms:
        norms, state = rows.norms(), self.public_state
        products = rows.dot(state.direction).to(norms)
        return mechanism.sample_terms(
            losses.to(norms), norms, products, state, self.irw, self.max_grad_norm
        )

    def _sums(self, rows: ClippableGradients, terms: SampleTerms) -> Sums:
        dropped = terms.counted == 0
        if dropped.any():
            rows = rows.without(dropped)

        def total(weights: Tensor) -> dict[Any, Tensor]:
            found = rows.combine(weights)  # without those that the losses do not depend on
            return {p: found[p] if p in found else torch.zeros_like(p) for p in self.params}

        counts = terms.counts()[: self.irw.count_releases]
        sums = {"gradient": total(terms.clip * terms.weights), "count": dict(enumerate(counts))}
        if self.irw.uses_direction:
            sums["direction"] = total(terms.clip * terms.tail)
        return sums

    def _release(self, sums: Sums) -> Released:
        """Noise on the sums, and the gradient in ``p.grad``."""
        scales, C = asdict(self.noise_scales), self.max_grad_norm
        stds = {kind: std if kind == "count" else std * C for kind, std in scales.items()}
        noisy = {
            kind: {key: self._noisy(total, stds[kind]) for key, total in totals.items()}
            for kind, totals in sums.items()
        }
        for p, total in noisy["gradient"].items():
            p.grad = total.view_as(p).to(p.dtype)
        self.scale_grad()
        counts = torch.stack([*noisy["count"].values()]).tolist()
        tail, saturated = [*counts, None][:2]
        return Released(tail, saturated, noisy.get("direction"))

    def _noisy(self, total: Tensor, std: float) -> Tensor:
        silent = self.over_ranks and dist.get_rank() > 0
        noisy = total + (0 if silent else self._noise(std, total))
        if self.over_ranks:
            dist.all_reduce(noisy)
        return noisy

    def _noise(self, std: float, like: Tensor) -> Tensor:
        noise: Tensor = _generate_noise(
            std=std, reference=like, generator=self.generator, secure_mode=self.secure_mode
        )
        return noise

    def _refuse_mid_batch(self, what: str) -> None:
        if self._logical_batch is not None:
            raise DPGuaranteeError(
                f"{what} in the middle of a logical batch, whose sums have no noise yet: call it "
                "after the step that ends the batch, or discard_batch() if the loop broke off"
            )
