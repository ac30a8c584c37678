"""Any torch optimizer, stepping on the intrinsically reweighted gradient."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from irw_optim.arguments import DPGuaranteeError
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.engine import Engine, OwnEngine
from irw_optim.weighting import ScoreRule
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.weights import check_labels, check_losses

from .at_hand import check_backward, check_reads_rows
from .options import Options, check_arguments, check_group, described
from .weighted_backward import WeightedBackward
from .wrapping import Hold, OptimizerWrapper, closure_step

_Step = TypeVar("_Step", bound=Callable[..., Any])

ScoreParameters: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None


def fires_own_hooks(step: _Step) -> _Step:
    """A ``step`` with its own hooks; global ones, which torch's decorator adds, the inner has."""

    @wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        for pre_hook in tuple(self._optimizer_step_pre_hooks.values()):
            args, kwargs = pre_hook(self, args, kwargs) or (args, kwargs)
        result = step(*args, **kwargs)
        for post_hook in tuple(self._optimizer_step_post_hooks.values()):
            post_hook(self, args, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # where torch looks whether to decorate
    return hooked  # type: ignore[return-value]


class IRWOptimizer(OptimizerWrapper):
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
        alpha: lower bound on the share of the smallest group, in (0, 1]; 0.2 to 0.3 if unknown.
        model: the module whose layers are hooked, in place.
        criterion: the loss module that the loop calls, attached in place.
        outliers: filter in gradient space, for example `DBSCANFilter`; makes this IRWO.
        center: beta >= 0; subtracts beta times the average gradient from the direction.
        class_balance: give every class of the batch the same total weight.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / B.
        warmup_steps: this many optimizer steps with plain averaging first.
        score_parameters: parameters whose gradients make the scores: ``"last"``, names, or a
            predicate on (name, parameter); the update covers all. None takes all
            that this optimizer holds.
        engine: ``"auto"``, ``"ghost"``, ``"autodiff"`` or ``"grad_sample"``; or a callable
            ``(losses, parameters) -> PerSampleGradients``, an engine of your own.
        weighting: ``"irw"``, ``"cvar"``, ``"uniform"``, or a callable
            ``(losses, gradients, worst_off) -> scores``, all of shape (B,).
        accumulation_steps: 1 chooses S and the weights inside each backward pass, which adds to
            ``p.grad`` as usual; k over k passes together: after the warm-up, ``p.grad`` stays
            as it was until the k-th one, and then has the weighted gradient of all of them.
        worst_off: over several processes, with the model in DistributedDataParallel or under
            ``fully_shard``: ``"global"``, the step of one process on the batch of all; or
            ``"local"``, each process weighs its own batch, which costs no message.
        compile: have torch compile the products of layers, in seconds for each shape of batches:
            about half the kernels, and no gain on the CPU. The log says what it leaves alone.

    Attributes:
        inner: the optimizer that takes the step.
        scheme: decides the weights.
        engine: gives the per-sample gradients.
        processes: those that the model trains in; None for this one alone.
        last_step: the `StepRecord` of the newest backward pass, or of the newest logical batch.
        steps: optimizer steps taken.

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
        engine: str | OwnEngine = "auto",
        weighting: str | ScoreRule = "irw",
        accumulation_steps: int = 1,
        worst_off: str = "global",
        compile: bool = False,
    ) -> None:
        options = Options(
            *(alpha, outliers, center, class_balance, mix, warmup_steps),
            *(described(score_parameters), weighting, accumulation_steps, worst_off),
        )
        check_arguments(optimizer, model, criterion, engine, compile, options)
        chosen = None
        if model is not None and score_parameters is not None:
            chosen = select_parameters(model, score_parameters)
        with ExitStack() as undo:
            hooked = Engine(model, engine, bool(compile))
            undo.callback(hooked.remove_hooks)
            self._weighted = WeightedBackward(optimizer, hooked, options, chosen)
            undo.callback(self._weighted.release)
            self._hold = Hold()
            self.begin()
            self._weighted.attach(criterion)
            undo.pop_all()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer.

        Raises:
            ValueError: parameters that are not the model's; nothing has changed then.
        """
        known = self._weighted.parameters
        group = check_group(param_group, known, self.model, self.criterion)
        self.inner.add_param_group(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, per-sample ones too, and what backward has noted."""
        self.inner.zero_grad(set_to_none)
        self._weighted.clear()
        for parameter in self._weighted.parameters:
            if getattr(parameter, "grad_sample", None) is not None:
                parameter.grad_sample = None  # type: ignore[attr-defined]

    def backward(self, losses: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """Backpropagate per-sample losses with weights, in place of ``loss.backward()``.

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
        check_backward(self.engine, losses)
        if labels is not None:
            check_labels(labels, len(losses))
        value = losses.detach().mean()
        batch = PerSampleLosses(losses, value, 1.0, labels)
        self._weighted.loss(batch, of_the_model=True).backward()
        return value

    @fires_own_hooks
    def step(
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
            labels: (B,) classes, for ``class_balance``.

        Returns:
            What the inner optimizer returns: the closure's loss, or None.

        Raises:
            RuntimeError: the gradient at hand was not weighted.
            FloatingPointError: a loss or a score is not finite; parameters are as they were.
            DPGuaranteeError: the parameters are a private optimizer's.
        """
        weighted = self._weighted
        parameters = weighted.parameters
        for p in parameters:
            if getattr(p, "summed_grad", None) is not None:
                raise DPGuaranteeError(
                    "the parameters carry Opacus' summed_grad, and an IRWOptimizer would step "
                    "without noise; use irw_optim.privacy.IRWPrivacyEngine().make_private(..., "
                    "irw=IRWDPConfig()) with the plain optimizer"
                )
        if losses is not None:
            check_reads_rows(self.engine)
            weighted.weigh_rows(losses, labels)
        if closure is None:
            weighted.make_ready(parameters)
            result = self.inner.step()
        else:
            result = closure_step(weighted, closure)
        weighted.step_taken()
        return result

    def finish(self) -> None:
        """Decide a logical batch that has had fewer than ``accumulation_steps`` passes.

        `step` does so too; this is for what must see the gradient before, such as clipping.
        """
        self._weighted.finish()

    def detach(self) -> None:
        """Remove every hook: model and criterion are as they were."""
        self._weighted.release()

    def scored_parameters(self) -> set[Tensor]:
        """The parameters whose gradients make the scores."""
        return set(self._weighted.scored)


def select_parameters(model: nn.Module, chosen: ScoreParameters) -> set[Tensor]:
    """The parameters whose gradients make the scores (the paper's "key layers").

    A tied one goes by any of its names; ``"last"`` means the last layer that has trainable ones,
    None all of them.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    selected: set[Tensor]
    if chosen is None:
        selected = set(trainable.values())
    elif chosen == "last":
        owners = [name.rpartition(".")[0] for name in trainable]
        selected = {p for name, p in trainable.items() if name.rpartition(".")[0] == owners[-1]}
    elif callable(chosen) and not isinstance(chosen, nn.Module):
        selected = {p for name, p in trainable.items() if chosen(name, p)}
    elif isinstance(chosen, Sequence) and not isinstance(chosen, str):
        selected = set()
        for wanted in chosen:
            found = [name for name in named if name == wanted or name.startswith(f"{wanted}.")]
            if not found:
                raise ValueError(
                    f"score_parameters names {wanted!r}, which the model does not have; it has "
                    f"{', '.join([*named][:6])}{', ...' if len(named) > 6 else ''}"
                )
            selected.update(trainable[name] for name in found if name in trainable)
    else:
        raise TypeError(
            f"score_parameters={chosen!r}: expected None, 'last', a list of parameter or module "
            "names, or a predicate on (name, parameter)"
        )
    if not selected:
        raise ValueError(
            f"score_parameters={chosen!r} chooses no trainable parameter: there would be no scores"
        )
    return selected
