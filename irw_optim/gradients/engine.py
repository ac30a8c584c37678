"""Which engine takes which parameter, as the graph shows and autograd confirms.

``auto`` takes the ghost products for every parameter they cover exactly, and autodiff for the rest.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from irw_optim.attachments import Attachment, Renewed
from irw_optim.torch_internals import is_sharded_here

from .arrangement import arranged
from .backward_passes import keep_freed_memory
from .compiling import (
    compile_anew,
    is_compiled,
    is_compiled_module,
    is_control_flow,
    keep_out,
    keep_out_around,
    prepare,
)
from .coverage import Covering, Trust, covering_of, reads_of
from .graph import Graph, OfKinds, Plan
from .hooks import IN_CUDNN, hook_layers, silence_of, weighed_by, without_cudnn
from .mixing import Batch, flattened_from, follow_batch
from .packed import packed_as_one
from .protocol import PerSampleGradients
from .readings import NOTHING_READ, plan_of, read_around, read_in_a_pass

if TYPE_CHECKING:
    from .loss_gradients import LossGradients

logger = logging.getLogger("irw_optim")

OwnEngine = Callable[[Tensor, Sequence[Tensor]], PerSampleGradients]
"""``own(losses, parameters)``, with the losses' graph still there."""

ENGINES = ("auto", "ghost", "autodiff", "grad_sample")


class Engine(Renewed):
    """Hooks on a model, and what is known of how its gradients can be had.

    Args:
        model: hooked in place; None leaves autodiff alone.
        kind: one of `ENGINES`; or what makes an engine of one's own.
        compile: whether the products of layers are compiled.
    """

    def __init__(
        self, model: nn.Module | None, kind: str | OwnEngine = "auto", compile: bool = False
    ) -> None:
        self.model, self.compile = model, compile
        self.own = None if isinstance(kind, str) else kind
        self.kind = kind if isinstance(kind, str) else "autodiff"
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        return {n: vars(self)[n] for n in ("model", "own", "kind", "compile")}

    def begin(self) -> None:
        being_copied = self.model is not None and not vars(self.model)
        self.hooks: list[Attachment] | None = None if being_copied else silence_of(self.model)
        self.has_layer_hooks = self.sees_fused = self.made_anew = False
        model = None if being_copied else self.model
        prepare(model)
        keep_freed_memory()
        if model is not None:
            weighed_by(model).add(self)
            # Compiled, the graph does not show layers; sharded, a rank without samples needs them.
            if self.kind == "ghost" or any(
                is_compiled_module(m) or is_sharded_here(m) for m in model.modules()
            ):
                self.add_layer_hooks()
        self.known: dict[str, bool] = {}
        self.coverings: OfKinds[Covering] = OfKinds()
        self.plans: OfKinds[Plan] = OfKinds()
        self.common: OfKinds[dict[str, Any]] = OfKinds()
        self.trust: dict[Hashable, Trust] = {}
        self.told: set[str] = set()
        self.programs: dict[Hashable, Any] = {}  # of compiled products
        self.uses = 0
        self.unfamiliar = True
        self.checked_for_hooks: OfKinds[bool] = OfKinds()
        self.random = torch.Generator().manual_seed(0)

    def add_layer_hooks(self) -> None:
        if self.hooks is not None and self.model is not None and not self.has_layer_hooks:
            self.has_layer_hooks = True
            self.hooks += [] if self.kind == "autodiff" else hook_layers(self.model)

    def covering(self, batch: "LossGradients", *, sharded: bool = False) -> Covering:
        """What is known of a kind of graph; its layer calls are found, with the batch in front.

        Where it is ``sharded``, only hooks have seen the layers.
        """
        losses, graph, own = batch.losses, batch.graph, batch.leaves
        plan = self.plans.get(graph.kind)
        self.unfamiliar = plan is None
        if plan is not None and (sites := plan.sites(graph, losses)) is not None:
            graph.sites = sites
            return plan.covering
        size = losses.shape[0]
        at, found, always = Batch(None), None, False
        if self.kind != "autodiff" and size > 1:
            at = follow_batch(losses, graph)
        if at.followed and not sharded:
            spares = batch.one_product and self.kind == "auto"
            found = read_in_a_pass(losses, graph, at, own, spares_memory=spares)
        elif at.mixed_by and not at.surely_mixes and not sharded:
            around, found = read_around(losses, graph, own)
            at = at if found is None else around
        if found is not None:
            graph.sites = found[1]
        elif not sharded and size > 1 and self._goes_forwards(at, graph):
            graph.sites = []
            always = at.followed or at.surely_mixes
            self._take_packed_as_one()
        elif size > 1 and not (self.has_layer_hooks or any(map(is_control_flow, graph.order))):
            self.add_layer_hooks()  # the graph does not show layers
            if any(map(is_compiled, graph.order)):
                compile_anew(graph.order)
                self.made_anew = True
        graph.sites = arranged(graph, at, size)
        # One sample alone does not show whether the forward mixes them.
        trusted, reads = (size > 1, at.mixed_by), reads_of(graph, own, at)
        kind = (trusted, *reads, *map(id, own))
        covering = self.coverings.get(kind)
        if covering is None:
            trust = self.trust.setdefault(trusted, Trust())
            covering = covering_of(graph, own, at, reads, trust)
            if size > 1:
                self.coverings[kind] = covering
                if found is NOTHING_READ:
                    self.tell(logging.INFO, "recomputed", _RECOMPUTED)
                elif not sharded:
                    self._report(covering, own)
                if not sharded and (shape := flattened_from(graph, size)):
                    self.tell(
                        logging.WARNING, "parts", _PARTS.format(losses=size, shape=tuple(shape))
                    )
        if found is not None or always:
            self.plans[graph.kind] = plan_of(found[0] if found else (), graph, covering, at)
        return covering

    def _goes_forwards(self, batch: Batch, graph: Graph) -> bool:
        if self.kind == "ghost":
            return False
        if batch.followed or batch.surely_mixes:
            return True
        return not (self.known.get("row_by_row") or any(map(is_compiled, graph.order)))

    def _take_packed_as_one(self) -> None:
        """From the next forward on, where samples meet."""
        if self.hooks is not None and self.model is not None and not self.known.get("packed"):
            self.known["packed"] = True
            self.hooks += packed_as_one(self.model)

    def left(self) -> None:
        """After a pass row by row: have the next forward show what was hidden."""
        model = self.model
        if model is None:
            return
        if self.made_anew:
            self.made_anew = False
        elif self.sees_fused and (around := self._kept_out_around_uncovered(model)):
            self.hooks = [*(self.hooks or ()), *around]
            self.tell(logging.INFO, "kept out around", _KEPT_OUT_AROUND)
        elif self.sees_fused:
            self.hooks, self.has_layer_hooks = [*silence_of(model), *keep_out(model)], False
            self.known["packed"] = False
            self.tell(logging.WARNING, "kept out", _KEPT_OUT)
        elif self.known.pop(IN_CUDNN, False) and (layers := without_cudnn(model)):
            self.hooks = [*(self.hooks or ()), *layers]
            self.tell(logging.INFO, "cuDNN", _WITHOUT_CUDNN)
        else:
            return
        del self.known["row_by_row"]

    def _kept_out_around_uncovered(self, model: nn.Module) -> list[Attachment]:
        if self.known.get("kept out around") or not self.coverings:
            return []
        self.known["kept out around"] = True
        newest = next(reversed(self.coverings.values()))
        trained = {p for p in model.parameters() if p.requires_grad}
        return keep_out_around(model, trained - newest.covered)

    def check_is_due(self, covering: Covering, watched: bool = False) -> bool:
        """Where samples may mix unwatched; else at what is new, and at uses 1, 2, 4, ..."""
        trust = covering.trust
        trust.uses += 1
        may_mix = covering.mixed_by is not None and not watched
        return may_mix or trust.uses & (trust.uses - 1) == 0 or not covering.reads <= trust.proven

    def hook_check_is_due(self, graph: Graph) -> bool:
        """In a new graph, and at uses 2, 4, ..."""
        self.uses += 1
        if self.uses & (self.uses - 1) == 0:
            return True
        if not self.unfamiliar:
            return False
        kind = graph.wiring, tuple(map(type, graph.order))
        new = kind not in self.checked_for_hooks
        self.checked_for_hooks[kind] = True
        return new

    def reject(self, covering: Covering, wrong: dict[Tensor, float]) -> None:
        """Leave to autograd the parameters on which it disagrees."""
        for known in (covering, *self.coverings.values()):
            if known.trust is covering.trust:
                known.lose(wrong)
        by = covering.mixed_by
        reason = "they are also used outside of their layers, or by a rule that is not theirs"
        if by is not None:
            reason = f"their samples meet in the forward (at {by.rpartition('::')[2]})"
        names = self.names_of(wrong)
        if self.kind == "ghost":
            raise RuntimeError(
                f'engine="ghost" is not exact for {names}: {reason}, and the ghost products differ '
                f'from autograd by {max(wrong.values()):.2g} of the gradient; use engine="auto"'
            )
        text = f"{names} are scored by autodiff, exact but slower: {reason}"
        self.tell(logging.WARNING, "outside" if by is None else "mixing", text)

    def covered_parameters(self) -> set[Tensor]:
        """In every graph so far."""
        known = [covering.covered for covering in self.coverings.values()]
        return set.intersection(*known) if known else set()

    def names_of(self, parameters: Iterable[Tensor]) -> str:
        """For messages; shapes of what is not the model's."""
        named = () if self.model is None else self.model.named_parameters()
        names: dict[Any, str] = {p: name for name, p in named}
        found = sorted(names.get(p, f"a leaf of shape {tuple(p.shape)}") for p in parameters)
        return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")

    def remove_hooks(self) -> None:
        self.hooks = []
        if self.model is not None:
            weighed_by(self.model).discard(self)

    def _report(self, covering: Covering, own: Sequence[Tensor]) -> None:
        rest = [p for p in own if p not in covering.covered and p not in covering.trust.lost]
        if not rest or self.kind == "autodiff":
            return
        if self.kind == "ghost":
            raise RuntimeError(
                f'engine="ghost" does not cover {self.names_of(rest)}; use engine="auto", which '
                "takes autodiff for them"
            )
        self.tell(
            logging.INFO,
            "uncovered",
            f"quick products for {len(covering.covered)} parameters, autodiff (exact, two to three "
            f"plain steps) for {self.names_of(rest)}: {covering.reason}",
        )

    def tell(self, level: int, about: str, text: str) -> None:
        """Once for a model, whose forward may vary at every turn."""
        logger.log(logging.DEBUG if about in self.told else level, text)
        self.told.add(about)


_RECOMPUTED = (
    "activation checkpointing: scores are pushed forward, in the memory of the plain step and 2.5 "
    'times its time; engine="ghost" takes 1.5, and the memory of a step without checkpointing'
)
_KEPT_OUT = (
    "torch.compile leaves this model alone from now on: parameters in what it fuses would take one "
    "backward pass a sample. See 'torch.compile' in the documentation of models"
)
_KEPT_OUT_AROUND = (
    "torch.compile leaves the modules alone whose parameters have no quick products; what these "
    "call is still compiled"
)
_WITHOUT_CUDNN = (
    "recurrent layers take torch's own kernels from now on: with cuDNN's, scores would take one "
    "backward pass a sample"
)
_PARTS = (
    "{losses} losses come from numbers of shape {shape}: each counts as a sample, as tokens or "
    "pixels do where they are flattened. For whole sequences or pictures, call "
    'optimizer.backward(losses) with one loss for each: criterion with reduction="none", viewed as '
    "before, and its mean over all but their dimension"
)
