"""Which engine takes which parameter, decided by what the graph shows and autograd confirms.

``auto`` takes the ghost products for every parameter they cover exactly, and autodiff for the
rest. What they cover is known from the graph of each loss; whether exactly, from a comparison at
the first steps and whenever the set of layers changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from weakref import WeakSet

from torch import Tensor, nn

from irw_optim.attachments import Attachment
from irw_optim.copies import Renewed
from irw_optim.gradients.autodiff import AutodiffGradients, backward_to
from irw_optim.gradients.broadcast import with_batch
from irw_optim.gradients.capture import Graph, walk
from irw_optim.gradients.ghost import GhostGradients, ghost_gradients
from irw_optim.gradients.hooks import hooks_of
from irw_optim.gradients.protocol import PerSampleGradients, StackedGradients
from irw_optim.gradients.verification import compare_with_autograd

logger = logging.getLogger("irw_optim")

KNOWN_GRAPHS = 256
"""Kinds of graphs remembered at once: a forward that changes for ever must not fill the memory."""

ENGINES = ("auto", "ghost", "autodiff", "grad_sample")


class Engine(Renewed):
    """Hooks on a model, and what is known of how its gradients can be had.

    Args:
        model: hooked in place; None leaves autodiff alone.
        kind: ``"auto"``, ``"ghost"`` (raises where it does not cover) or ``"autodiff"``.
    """

    PASSING = ("hooks", "known", "coverings")

    def __init__(self, model: nn.Module | None, kind: str = "auto") -> None:
        self.model = model
        self.kind = kind
        self.begin()

    def begin(self) -> None:
        """Hook the model, and know nothing of it yet."""
        self.hooks: list[Attachment] | None = hooks_of(self.model, self.kind)
        self._forget()

    def _forget(self) -> None:
        self.known: dict[str, bool] = {}
        self.coverings: dict[tuple[object, ...], Covering] = {}

    def capture(self, losses: Tensor) -> LossGradients:
        """Take note of a batch of losses: what leads to them, and who else shares it."""
        if self.hooks is None:
            self.begin()
        batch = LossGradients(self, losses, with_batch(walk(losses), len(losses)))
        for other in _WAITING:
            if not other.graph.nodes.isdisjoint(batch.graph.nodes):
                other.sharing.add(batch)
                batch.sharing.add(other)
        _WAITING.add(batch)
        return batch

    def covering(self, graph: Graph, batch_size: int, *, report: bool = True) -> Covering:
        """What is known of graphs with these layers and leaves.

        Args:
            graph: of one vector of losses.
            batch_size: B.
            report: whether to say what is left to autodiff, or to refuse it.
        """
        found = [call.find_batch(batch_size, shape) for call, _, shape in graph.sites]
        key = (
            batch_size > 1,  # one sample alone does not show whether the forward mixes them
            *found,
            *[call.arrangement() for call, _, _ in graph.sites],
            *[id(p) for call, _, _ in graph.sites for p in call.parameters.values()],
            *map(id, graph.leaves),
            frozenset(map(type, graph.nodes)),
        )
        covering = self.coverings.get(key)
        if covering is None:
            if len(self.coverings) >= KNOWN_GRAPHS:
                self.coverings.clear()
            covering = self.coverings[key] = _what_is_covered(graph, found)
            if report:
                self._report(covering, graph.leaves)
        return covering

    def reject(self, covering: Covering, wrong: dict[Tensor, float]) -> None:
        """Stop using the ghost products for parameters on which autograd disagrees."""
        covering.lose(wrong)
        worst = max(wrong.values())
        reason = (
            f"the ghost products differ from autograd by up to {worst:.2g} of the gradient for "
            f"{self.names_of(wrong)}: the forward mixes samples or uses these parameters outside "
            "their layers"
        )
        if self.kind == "ghost":
            raise RuntimeError(f'engine="ghost": {reason}; use engine="auto"')
        logger.warning("%s; they go through autodiff from now on, exact but slower", reason)

    def covered_parameters(self) -> set[Tensor]:
        """The parameters that the ghost products covered in every graph met so far."""
        known = [covering.covered for covering in self.coverings.values()]
        return set.intersection(*known) if known else set()

    def names_of(self, parameters: Iterable[Tensor]) -> str:
        """Names in the model, for messages; shapes for what is not the model's."""
        names = {} if self.model is None else {p: n for n, p in self.model.named_parameters()}
        texts = sorted(names.get(p, f"a leaf of shape {tuple(p.shape)}") for p in parameters)  # type: ignore[call-overload]
        return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")

    def remove_hooks(self) -> None:
        self.hooks = []

    def _report(self, covering: Covering, leaves: list[Tensor]) -> None:
        rest = [p for p in leaves if p not in covering.covered]
        if not rest or self.kind == "autodiff":
            return
        if self.kind == "ghost":
            raise RuntimeError(
                f'engine="ghost" does not cover {self.names_of(rest)}; use engine="auto", which '
                "takes autodiff for them"
            )
        logger.info(
            "ghost products for %d parameters, autodiff (exact, slower) for %s",
            len(covering.covered),
            self.names_of(rest),
        )


class Covering:
    """Which parameters the ghost products cover, and when to look whether they still do.

    Args:
        covered: the parameters that only layers with a rule read.
        whole: whether those are all there is: nothing is left for autograd.
    """

    def __init__(self, covered: set[Tensor], whole: bool) -> None:
        self.covered = covered
        self.whole = whole
        self.reached: set[int] = set()
        self.uses = 0

    def check_is_due(self) -> bool:
        """At uses 1, 2, 4, 8, ...: proven once is not for ever, where a forward may change."""
        self.uses += 1
        return self.uses & (self.uses - 1) == 0

    def lose(self, parameters: Iterable[Tensor]) -> None:
        """Leave these parameters to autograd from now on."""
        self.covered.difference_update(parameters)
        self.whole = False


def _what_is_covered(graph: Graph, found: list[bool]) -> Covering:
    inside: set[Tensor] = set()
    outside: set[Tensor] = set()
    for (call, _, _), has_batch in zip(graph.sites, found, strict=True):
        (inside if has_batch else outside).update(call.parameters.values())
    covered = inside.difference(outside).intersection(graph.leaves)
    whole = covered.issuperset(inside | outside | set(graph.leaves))
    sparse = any(call.needs_autograd_combine for call, _, _ in graph.sites)
    return Covering(covered, whole and not sparse)


class LossGradients:
    """The per-sample gradients behind one vector of losses, from forward to the end of backward.

    Args:
        engine: what is known from earlier batches.
        losses: (B,), with their graph.
        graph: what leads to them.
    """

    def __init__(self, engine: Engine, losses: Tensor, graph: Graph) -> None:
        self.engine = engine
        self.losses = losses
        self.graph = graph
        self.leaves = graph.leaves
        self.sharing: WeakSet[LossGradients] = WeakSet()
        self.rest = list(graph.leaves)
        self.finished_by_autograd = self.rest
        self.ghost: GhostGradients | None = None

    def start(self, seed: Tensor, keep_graph: bool) -> None:
        """The backward pass to the layers' outputs, with its check where one is due.

        Args:
            seed: 0-dim, not zero; the scale that the losses carry into half precision.
            keep_graph: whether somebody else will still walk the graph.
        """
        graph = self.graph
        covering = self.engine.covering(graph, self.losses.shape[0])
        if not covering.covered:
            return
        check = bool(len(self.losses)) and covering.check_is_due()
        if covering.whole and not check:
            self.rest = self.finished_by_autograd = []
            retain = keep_graph or bool(self.sharing)
            self.ghost = ghost_gradients(
                self.losses, graph.sites, seed, retain_graph=retain, reached=covering.reached
            )
            return
        covered = covering.covered
        sites = [s for s in graph.sites if not covered.isdisjoint(s.call.parameters.values())]
        ghost = ghost_gradients(self.losses, sites, seed, retain_graph=True)
        covering.reached = ghost.reached  # asked for where all sites are covered alone
        if check:
            parameters = [p for p in self.leaves if p in covered]
            wrong = compare_with_autograd(self.losses, ghost, parameters)
            if wrong:
                self.engine.reject(covering, wrong)
        sparse = {
            p for s in sites if s.call.needs_autograd_combine for p in s.call.parameters.values()
        }
        self.rest = [p for p in self.leaves if p not in covered]
        self.finished_by_autograd = [p for p in self.leaves if p not in covered or p in sparse]
        self.ghost = ghost.restricted_to(covered)

    def rows(self, parameters: Callable[[Tensor], bool]) -> PerSampleGradients:
        """G with the columns of the chosen parameters."""
        if self.ghost is not None and not self.rest and all(map(parameters, self.leaves)):
            return self.ghost
        parts: list[PerSampleGradients] = []
        chosen = {p for p in self.leaves if parameters(p)}
        rest = [p for p in self.rest if p in chosen]
        if self.ghost is not None:
            part = self.ghost.restricted_to(chosen)
            if part.calls:
                parts.append(part)
        if rest:
            parts.append(AutodiffGradients(self.losses, rest, self.engine.known))
        if not parts:
            raise RuntimeError(
                "the losses do not depend on any parameter that makes the scores: expected losses "
                "computed from the model under torch.enable_grad(), and score_parameters among "
                "the trainable parameters"
            )
        return parts[0] if len(parts) == 1 else StackedGradients(parts)

    def weighted_sum(self, weights: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Sum of w_i times the gradient of loss i, for every leaf in the order of `leaves`.

        This may be the last use: layers that only autograd can finish, and uncovered leaves, take
        one ordinary backward pass.
        """
        total: dict[Tensor, Tensor] = {}
        rest = self.finished_by_autograd
        last = not keep_graph and not self.sharing
        if self.ghost is not None and not rest:
            ghost = self.ghost
            if last:
                self._let_go()
            total = ghost.combine(weights, release=last)
        elif self.ghost is not None:
            total = self.ghost.restricted_to(set(self.leaves).difference(rest)).combine(weights)
        if rest:
            gradients = backward_to(rest, self.losses, weights, retain_graph=not last)
            total.update((p, g) for p, g in zip(rest, gradients, strict=True) if g is not None)
        return [None if (g := total.get(p)) is None else g.to(p.dtype) for p in self.leaves]

    def close(self) -> None:
        """The backward pass is over: nothing of it may be held any longer."""
        _WAITING.discard(self)
        for other in self.sharing:
            other.sharing.discard(self)
        if not self.sharing:
            self._let_go()
        self.ghost = None
        self.losses = self.losses.detach()
        self.graph = Graph([], [], set())

    def _let_go(self) -> None:
        """Hold the layers' inputs and output gradients no longer, here and on the graph."""
        self.graph.forget_calls()
        self.graph = Graph([], [], set())
        self.ghost = None


_WAITING: WeakSet[LossGradients] = WeakSet()
"""Losses whose backward pass is still to come, whichever engine's: they may share a graph."""
