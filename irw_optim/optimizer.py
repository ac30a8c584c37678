"""IRWOptimizer: any torch optimizer, stepping on the intrinsically reweighted gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from irw_optim.attach import AttachedForward
from irw_optim.checks import check_arguments, check_trains
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.local_scheme import LocalScheme, Scheme, averaged_loss
from irw_optim.outliers import OutlierFilter
from irw_optim.privacy.errors import DPGuaranteeError
from irw_optim.record import StepRecord
from irw_optim.selection import ScoreParameters, select_parameters
from irw_optim.weighting import Alignment, Equality, Membership, ScoreRule, check_losses


class IRWOptimizer(Optimizer):
    """Wraps a torch optimizer so that it steps on sum_i w_i g_i instead of the average gradient.

    The weights favour the samples on which a step lowers the loss of the worst-off
    alpha-fraction of the batch: w_i is proportional to max(0, <g_i, g_S>) (arXiv 2411.03068,
    section III). No group label is used.

    Three ways in::

        # 1. one line; the training loop stays as it was
        optimizer = IRWOptimizer(SGD(model.parameters(), lr=0.1), alpha=0.2,
                                 model=model, criterion=criterion)

        # 2. your own per-sample losses, shape (B,), in place of loss.backward()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))

        # 3. per-sample gradients that Opacus' GradSampleModule already made
        losses.mean().backward(); optimizer.step(losses=losses)

    In ways 1 and 2 ``p.grad`` is final when backward returns.

    Args:
        optimizer: the optimizer that takes the step.
        alpha: lower bound on the share of the smallest group, in (0, 1]; 0.2 to 0.3 is a good
            start where it is unknown.
        model: the module whose layers are hooked, in place.
        criterion: the loss module that the loop calls, attached in place.
        outliers: filter in gradient space, for example `DBSCANFilter`; makes this IRWO.
        center: beta >= 0; subtracts beta times the average gradient from the direction.
        class_balance: give every class of the batch the same total weight.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / B.
        warmup_steps: this many optimizer steps with plain averaging first.
        score_parameters: parameters whose gradients make the scores: ``"last"``, names, or a
            predicate on (name, parameter); the update covers all. None takes all.
        engine: ``"auto"``, ``"ghost"``, ``"autodiff"`` or ``"grad_sample"``.
        weighting: ``"irw"``, ``"cvar"``, ``"uniform"``, or a callable
            ``(losses, gradients, worst_off) -> scores``, all of shape (B,).

    Raises:
        TypeError, ValueError: an argument that is impossible, named with what is allowed.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model, criterion = torch.nn.Linear(4, 2), torch.nn.CrossEntropyLoss()
    >>> optimizer = IRWOptimizer(
    ...     torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model, criterion=criterion
    ... )
    >>> x, y = torch.randn(10, 4), torch.randint(0, 2, (10,))
    >>> optimizer.zero_grad()
    >>> criterion(model(x), y).backward()
    >>> optimizer.step()
    >>> int(optimizer.last_step.worst_off.sum()), round(float(optimizer.last_step.weights.sum()), 4)
    (2, 1.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        alpha: float,
        model: nn.Module | None = None,
        criterion: nn.Module | None = None,
        outliers: OutlierFilter | None = None,
        center: float = 0.0,
        class_balance: bool = False,
        mix: float = 0.0,
        warmup_steps: int = 0,
        score_parameters: ScoreParameters = None,
        engine: str = "auto",
        weighting: str | ScoreRule = "irw",
    ) -> None:
        check_arguments(
            optimizer,
            alpha=alpha,
            model=model,
            criterion=criterion,
            outliers=outliers,
            center=center,
            class_balance=class_balance,
            mix=mix,
            warmup_steps=warmup_steps,
            engine=engine,
            weighting=weighting,
        )
        self._score_parameters = (
            None if score_parameters is None else select_parameters(model, score_parameters)
        )
        self.optimizer = optimizer
        rule = _rule(weighting, center)
        self.scheme: Scheme = LocalScheme(float(alpha), rule, outliers, class_balance, mix)
        self.warmup_steps = warmup_steps
        self.steps = 0
        self.last_step: StepRecord | None = None
        self._pending: list[StepRecord] = []
        super().__setstate__({})  # torch's hook tables, without its groups and state
        self._attached: AttachedForward | None = None
        if criterion is not None:
            self._attached = AttachedForward(criterion, cast(nn.Module, model), self._loss)
        self.engine = Engine(model, engine)

    # What a torch optimizer is: everything that is the inner one's stays there ---------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, per-sample ones too, and what backward has noted since."""
        self.optimizer.zero_grad(set_to_none)
        self._pending.clear()
        for parameter in self._parameters():
            if getattr(parameter, "grad_sample", None) is not None:
                parameter.grad_sample = None  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state under its usual keys, ours under ``"irw"``."""
        return {**self.optimizer.state_dict(), "irw": {"steps": self.steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of a plain one."""
        inner = dict(state_dict)
        own = inner.pop("irw", None)
        self.optimizer.load_state_dict(inner)
        if own is not None:
            self.steps = own["steps"]

    # The three ways in -----------------------------------------------------------------------

    def backward(self, losses: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """Backpropagate per-sample losses with IRW weights, in place of ``loss.backward()``.

        Args:
            losses: (B,), with their graph; a factor on them (a gradient scaler's, or
                1/accumulation steps) scales the gradient and leaves the weights alone.
            labels: (B,) classes, for ``class_balance``.

        Returns:
            The mean loss, 0-dim, detached.

        Raises:
            TypeError, ValueError, RuntimeError: no vector of losses, or one without a graph.
        """
        check_losses(losses)
        check_trains(losses)
        value = losses.detach().mean()
        self._loss(PerSampleLosses(losses, value, 1.0, labels)).backward()  # type: ignore[no-untyped-call]
        return value

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        losses: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Take the inner optimizer's step on the weighted gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.optim.
            losses: (B,) per-sample losses, with gradients in ``p.grad_sample`` (way 3).
            labels: (B,) classes, for ``class_balance`` with ``losses``.

        Returns:
            What the inner optimizer returns: the closure's loss, or None.

        Raises:
            RuntimeError: no weighted gradient was made since the last step.
            FloatingPointError: a loss or a score is not finite; parameters are as they were.
            DPGuaranteeError: the parameters belong to a differentially private optimizer.
        """
        if any(getattr(p, "summed_grad", None) is not None for p in self._parameters()):
            raise DPGuaranteeError(
                "the parameters carry Opacus' summed_grad: an IRWOptimizer inside make_private "
                "would step on gradients without noise; use irw_optim.privacy.IRWPrivacyEngine()"
                ".make_private(..., irw=IRWDPConfig()) with the plain optimizer"
            )
        if losses is not None:
            self._weigh_grad_samples(losses, labels)
        if closure is None:
            self._check_gradient()
            result = self.optimizer.step()
        else:
            result = self.optimizer.step(lambda: self._evaluated(closure))
        self._pending.clear()
        self.steps += 1
        return result

    def scored_parameters(self) -> set[Tensor]:
        """The parameters whose gradients make the scores."""
        chosen = self._score_parameters
        return {p for p in self._parameters() if chosen is None or p in chosen}

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion that is attached, if one is."""
        return None if self._attached is None else self._attached.criterion

    def detach(self) -> None:
        """Remove every hook: model and criterion are as they were before."""
        self.engine.remove_hooks()
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    # How they meet ---------------------------------------------------------------------------

    def _loss(self, batch: PerSampleLosses) -> Tensor:
        """The criterion's value, carrying the weighted gradient."""
        if not batch.losses.requires_grad:
            return batch.value
        if self.steps < self.warmup_steps:
            return averaged_loss(batch, self._note)
        scored = self.scored_parameters()
        return self.scheme.loss(batch, self.engine, scored.__contains__, self._note)

    def _weigh_grad_samples(self, losses: Tensor, labels: Tensor | None) -> None:
        check_losses(losses)
        rows = MaterializedGradients.from_grad_sample(self._parameters())
        if rows.batch_size != len(losses):
            raise ValueError(
                f"losses has {len(losses)} samples but p.grad_sample has {rows.batch_size}: "
                "expected the losses of the batch that was backpropagated last"
            )
        batch = PerSampleLosses(losses.detach(), losses.detach().mean(), 1.0, labels)
        chosen = self._score_parameters
        scored = {p: g for p, g in rows.rows.items() if chosen is None or p in chosen}
        record = self.scheme.decide(batch, MaterializedGradients(scored))
        for parameter, gradient in rows.combine(record.weights).items():
            parameter.grad = gradient.to(parameter.dtype)
        self._note(record)

    def _note(self, record: StepRecord) -> None:
        self._pending.append(record)
        self.last_step = record

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._check_gradient()
        return loss

    def _check_gradient(self) -> None:
        """Raise unless the gradient at hand is weighted and finite."""
        if not self._pending:
            raise RuntimeError(
                "step() found no weighted gradient since the last step: expected "
                "criterion(model(x), y).backward() on the attached criterion with the model in "
                "train mode, optimizer.backward(losses), or step(losses=losses) after Opacus"
            )
        for record in self._pending:
            broken = record.broken_samples
            if broken:
                shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
                raise FloatingPointError(
                    f"the losses or gradients of {len(broken)} samples are not finite (batch "
                    f"indices {shown}): nothing was updated; look at optimizer.last_step.losses"
                )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _rule(weighting: str | ScoreRule, center: float) -> ScoreRule:
    if not isinstance(weighting, str):
        return weighting
    rules: dict[str, ScoreRule] = {
        "irw": Alignment(center),
        "cvar": Membership(),
        "uniform": Equality(),
    }
    return rules[weighting]
