"""Opacus' PrivacyEngine, wired for DP-IRW."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import GradSampleHooks
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from irw_optim.arguments import DPGuaranteeError, real_number, whole_number
from irw_optim.restored import undo_inside

from . import refusals
from .mechanism import IRWDPConfig
from .optimizer import IRWDPOptimizer
from .pending import GhostBatch


class IRWPrivacyEngine(PrivacyEngine):  # type: ignore[misc]  # Opacus is untyped
    """Makes a model, an optimizer and a loader private, with intrinsic reweighting.

    All else is Opacus' own. Guarantee: (epsilon, delta)-differential privacy for adding or removing
    one sample, of all that a step releases: the parameters and the optimizer's ``public_state``.

    Example:
        >>> import math, warnings
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(64, 5), torch.randint(0, 2, (64,)))
        >>> model, criterion = nn.Linear(5, 2), nn.CrossEntropyLoss()
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # Opacus: secure_mode is off
        ...     engine = IRWPrivacyEngine(accountant="rdp")
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=DataLoader(data, batch_size=16),
        ...     criterion=criterion,
        ...     noise_multiplier=1.0,
        ...     max_grad_norm=1.0,
        ...     irw=IRWDPConfig(init_threshold=math.log(2)),
        ... )
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> engine.accountant.history
        [(1.0, 0.25, 4)]
    """

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        irw: IRWDPConfig,
        criterion: nn.Module | None = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **unknown: Any,
    ) -> tuple[Any, IRWDPOptimizer, DataLoader[Any]]:
        """Make a training private; arguments mean what they mean to Opacus.

        Args:
            module: the model, in training mode, without BatchNorm; over several processes in
                Opacus' DifferentiallyPrivateDistributedDataParallel.
            optimizer: a plain torch optimizer over its parameters.
            data_loader: of the whole data set; replaced by a Poisson sampling one.
            noise_multiplier: sigma, of the whole step.
            max_grad_norm: C, to which the norm of each sample's gradient is clipped.
            irw: the parameters of DP-IRW.
            criterion: loss module, whose calls in training hand the optimizer the per-sample
                losses. None: call ``optimizer.step(losses=losses)``.
            batch_first: whether the batch is dimension 0 of the model's input.
            loss_reduction: of the loss that goes backward.
            poisson_sampling: must be True.
            clipping: must be "flat".
            noise_generator: for tests; its seed must stay secret.
            grad_sample_mode: "hooks", "functorch" or "ew", as Opacus; or "ghost", the same step
                without per-sample gradients, which needs `criterion`.
            wrap_model: False attaches hooks to the model, as ghost mode does.
            rand_on_empty: must be False.
            **unknown: refused.

        Returns:
            The model (or the hooks object), the private optimizer and the Poisson loader.

        Raises:
            DPGuaranteeError: what would void the guarantee.
            NotImplementedError: what could be private but is not built.
            TypeError, ValueError: a value outside its range. Nothing has changed in any case.
        """
        refusals.refuse_options(unknown, of=self.make_private)
        refusals.check_fixed(
            poisson_sampling=poisson_sampling, rand_on_empty=rand_on_empty, clipping=clipping
        )
        noise_multiplier, max_grad_norm = refusals.check_mechanism(
            irw, optimizer, noise_multiplier, max_grad_norm, loss_reduction
        )
        refusals.check_loader(data_loader)
        refusals.check_module(module, optimizer, criterion)
        refusals.check_ways(
            grad_sample_mode,
            criterion,
            loss_reduction,
            noise_generator,
            batch_first,
            self.secure_mode,
        )
        ghost = grad_sample_mode == "ghost"
        touched = [self, *module.modules(), *module.parameters(), optimizer, data_loader]
        with _undone_on_error([*touched, criterion]):  # Opacus hooks first and raises later
            private_module, private_optimizer, private_loader = super().make_private(
                module=module,
                optimizer=optimizer,
                data_loader=data_loader,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                batch_first=batch_first,
                loss_reduction=loss_reduction,
                noise_generator=noise_generator,
                grad_sample_mode="no_op" if ghost else grad_sample_mode,
                wrap_model=wrap_model and not ghost,
                irw=irw,
            )
            if ghost:
                private_optimizer.pending = GhostBatch(loss_reduction, module)
                private_module = module
            else:
                # Opacus' guard raises in mid-backward; the optimizer's before the step, by name.
                private_module.allow_grad_accumulation()
            if criterion is not None:
                hooks = private_module if isinstance(private_module, GradSampleHooks) else None
                private_optimizer.pending.follow(criterion, module, hooks)
            return private_module, private_optimizer, private_loader

    def make_private_with_epsilon(
        self,
        *,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        epsilon_tolerance: float = 0.01,
        **options: Any,
    ) -> tuple[Any, IRWDPOptimizer, DataLoader[Any]]:
        """`make_private` with the noise that spends `target_epsilon` in `epochs` passes.

        Args:
            data_loader: as of `make_private`.
            target_epsilon: the budget, > 0.
            target_delta: probability with which it may fail, in (0, 1); well below 1/N.
            epochs: passes over the loader.
            epsilon_tolerance: how far below the target the search may stop, >= 1e-4.
            **options: of `make_private`, without ``noise_multiplier``.

        Raises:
            DPGuaranteeError: budget was spent already; all else as `make_private`.
        """
        refusals.check_loader(data_loader)
        search = {
            "target_epsilon": real_number("target_epsilon", target_epsilon, "(0, inf)"),
            "target_delta": real_number("target_delta", target_delta, "(0, 1)"),
            "epochs": whole_number("epochs", epochs, 1),
            # The search would not end.
            "epsilon_tolerance": real_number("epsilon_tolerance", epsilon_tolerance, "[1e-4, inf)"),
        }
        if len(self.accountant):
            raise DPGuaranteeError(
                "this engine has accounted for steps already, and would overspend the target: use "
                "a new IRWPrivacyEngine, or make_private with a noise_multiplier"
            )
        return self.make_private(
            data_loader=data_loader,
            noise_multiplier=get_noise_multiplier(
                sample_rate=1 / len(data_loader), accountant=self.accountant.mechanism(), **search
            ),
            **options,
        )

    def get_epsilon(self, delta: float) -> float:
        """The epsilon spent so far, for a ``delta`` in (0, 1)."""
        return float(super().get_epsilon(real_number("delta", delta, "(0, 1)")))

    def _prepare_data_loader(
        self, data_loader: DataLoader[Any], *, distributed: bool, **options: Any
    ) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._prepare_data_loader(
            data_loader, distributed=distributed, **options
        )
        if distributed:
            shard: Any = loader.batch_sampler
            own = _EveryDraw(
                total_size=shard.total_size,
                sample_rate=shard.sample_rate,
                generator=self.secure_rng or _of_this_rank(data_loader.generator),
            )
            object.__setattr__(loader, "batch_sampler", own)  # which a DataLoader itself refuses
        return loader

    def _prepare_optimizer(
        self,
        *,
        optimizer: Optimizer,
        distributed: bool,
        expected_batch_size: float,
        noise_generator: torch.Generator | None,
        clipping: str,
        grad_sample_mode: str,
        **options: Any,
    ) -> IRWDPOptimizer:
        ranks = dist.get_world_size() if distributed else 1  # Opacus gives the share of one rank
        private = IRWDPOptimizer(
            optimizer,
            expected_batch_size=expected_batch_size * ranks,
            generator=self.secure_rng if self.secure_mode else noise_generator,
            secure_mode=self.secure_mode,
            **options,
        )
        private.over_ranks = distributed
        return private


class _EveryDraw(DistributedUniformWithReplacementSampler):  # type: ignore[misc]  # untyped
    """Poisson sampling from this rank's shard, also draws of nobody: others step then."""

    def __iter__(self) -> Iterator[list[int]]:
        seeded = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
        order = torch.randperm(self.total_size, generator=seeded, device="cpu")
        mine = order[self.rank :: self.num_replicas]
        for _ in range(len(self)):
            chances = torch.rand(len(mine), generator=self.generator, device="cpu")
            yield mine[chances < self.sample_rate].tolist()


def _of_this_rank(given: torch.Generator | None) -> torch.Generator:
    """Independent of other ranks', as amplification needs: scripts seed all alike."""
    own = torch.Generator()
    if given is None:
        own.seed()
        return own
    return own.manual_seed(given.initial_seed() + 1 + dist.get_rank())


@contextmanager
def _undone_on_error(objects: Iterable[object]) -> Iterator[None]:
    """If the block fails, objects have their attributes, and tables among these their contents."""
    attributes = [vars(thing) for thing in objects if hasattr(thing, "__dict__")]
    tables = [t for own in attributes for t in (own, *own.values()) if isinstance(t, dict | list)]
    undo = [action for table in tables for action in undo_inside(table)]
    try:
        yield
    except BaseException:
        for action in undo:
            action()
        raise
