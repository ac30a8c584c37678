"""`compare_remedies`: whether to reweight at all, and how, decided on one's own data.

A remedy is a function of a `Training` that returns a trained model.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from irw_optim.arguments import as_whole, whole_number
from irw_optim.criterion import validate_criterion
from irw_optim.metrics._groups import ArrayLike, GroupsLike
from irw_optim.notebook import progress_bar
from irw_optim.optimizer import IRWOptimizer
from irw_optim.restored import randomness_restored
from irw_optim.schemes.batch_losses import Forward
from irw_optim.weighting.weights import check_alpha

from ._comparison import Comparison
from ._data import Data, Numbers, Samples, cluster_numbers, group_names, logits_of
from ._judging import Difference, Judge, conclude, signs_of_hurt, unseen_by_clusters
from ._training import ORACLE, PLAIN, REMEDIES, Fitted, Recipe, Remedy, Training, oracle_logits

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Difference", "Fitted", "Recipe", "Remedy", "Training"]

ADAM = partial(torch.optim.Adam, lr=1e-3)


def compare_remedies(
    make_model: Callable[[], nn.Module],
    criterion: nn.Module,
    train: Data,
    validation: Data,
    *,
    groups: GroupsLike | None = None,
    remedies: Iterable[str] | Mapping[str, Remedy] | None = None,
    seeds: int | Iterable[int] = 5,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = ADAM,
    scheduler: Callable[[torch.optim.Optimizer, int], Any] | None = CosineAnnealingLR,
    alpha: float = 0.3,
    clusters: ArrayLike | None = None,
    n_clusters: int = 4,
    min_cell: int = 20,
    forward: Forward | None = None,
    loader_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Train a model with each remedy, and say which one to take, if any, and how sure that is.

    Of a seed every remedy has the same initialisation and number of steps (balancing with half the
    steps: half; the two stages: a fifth more), and is measured on the validation data after the
    last one. Needs ``pip install "irw-optim[report]"``.

    Args:
        make_model: gives a new model: (N, classes) logits, or one number a sample.
        criterion: a classification loss, as of `IRWOptimizer`.
        train: a map-style data set, or ``(X, y)`` as NumPy arrays, tensors, lists or pandas.
        validation: as ``train``, of other people.
        groups: (N,) of ``validation``, or several columns, which are intersected. They add worst
            group and headroom, and decide; no remedy sees them.
        remedies: names of `REMEDIES`, or ``{name: remedy}``, simpler ones first, such as
            ``{**REMEDIES, "mine": mine}``. None takes all; plain is always in.
        seeds: how many, or which.
        epochs: of whole batches.
        batch_size: of a step.
        optimizer: makes one of the parameters.
        scheduler: ``scheduler(optimizer, steps)``, stepped after each step, or None.
        alpha: of the single trainings with IRW.
        clusters: (N,) of ``validation``, in place of k-means of its inputs.
        n_clusters: of k-means.
        min_cell: people that a cell or a group needs to count.
        forward: ``forward(model, batch)`` gives the criterion's arguments, the model's output
            first; None for batches (inputs, target).
        loader_options: of the DataLoaders over data sets: ``num_workers``, ``collate_fn``.
        progress: show a bar.

    Raises:
        ImportError: the extra ``report`` is not installed.
        TypeError, ValueError: an argument that does not fit, before anything trains.

    Warns:
        UserWarning: no groups, and clusters that are seen to miss somebody.
    """
    for needed in ("fairlearn", "jinja2", "matplotlib", "pandas", "tqdm"):
        if find_spec(needed) is None:
            raise ImportError(f'compare_remedies needs {needed}: pip install "irw-optim[report]"')
    chosen = _chosen(remedies)
    asked = seeds if isinstance(seeds, Iterable) else range(as_whole(seeds) or 0)
    numbers: list[Any] = list(map(as_whole, asked))
    if not numbers or len({*numbers} - {None}) < len(numbers):
        raise ValueError(f"seeds={seeds!r}: expected how many, >= 1, or different whole numbers")
    epochs = whole_number("epochs", epochs, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    n_clusters = whole_number("n_clusters", n_clusters, 1)
    min_cell = whole_number("min_cell", min_cell, 1)
    alpha = check_alpha(alpha)
    validate_criterion(criterion)
    with randomness_restored():
        model = make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"make_model() gave {model!r}: expected a torch.nn.Module")
        again = set(make_model().parameters())
        if any(p.requires_grad and p in again for p in model.parameters()):
            raise ValueError("make_model() gave the same parameters twice: expected new ones")
        people, judged = (
            Samples(name, data, model, criterion, loader_options or {}, forward)
            for name, data in (("train", train), ("validation", validation))
        )
        outputs, labels = people.read(model)
        classes = logits_of(outputs[:1], criterion).shape[1]
        truth = judged.read(model)[1]
        steps = epochs * max(1, len(people) // batch_size)
        of = "the parameters, such as functools.partial(torch.optim.SGD, lr=0.1)"
        made = _made("optimizer", optimizer, of, model.parameters())
        IRWOptimizer(made, alpha=alpha, model=model).detach()
        if scheduler:
            _made("scheduler", scheduler, "optimizer and steps, or None", made, steps)
        for name, found in (("train", labels), ("validation", truth)):
            if len(found.unique()) < 2:
                raise ValueError(f"{name} has a single class: expected two or more")
        inputs = judged.inputs(needed=clusters is None)
        cluster = cluster_numbers(inputs, clusters, n_clusters, judged)
        named = None if groups is None else group_names(groups, judged)
        judge = Judge(truth, cluster, named, min_cell)
        recipe = Recipe(make_model, criterion, optimizer, scheduler, steps, batch_size, forward)
        trainings = [Training(recipe, people, labels, classes, seed, alpha) for seed in numbers]
        rare = min(truth.unique().tolist(), key=lambda label: int((labels == label).sum()))
        runs, predictions = _train_all(trainings, chosen, judged, judge, rare, progress)
        flat = None if inputs is None else inputs.reshape(len(inputs), -1).cpu().numpy()
        right = predictions[PLAIN] == judge.labels
        blind = None if named is not None else unseen_by_clusters(flat, judge, right)
    if blind is not None:
        warnings.warn(f"no groups were given, and {blind}", stacklevel=2)
    settings = {
        "training": f"{steps} steps of {min(batch_size, len(people))} samples ({epochs} epochs of "
        f"{len(people):,}), {_named(optimizer)}, {_named(scheduler)}; the last step counts",
        "validation": f"{len(judged):,} people",
        "seeds": ", ".join(map(str, numbers)),
    }
    told = *conclude(runs, predictions, judge, blind), signs_of_hurt(runs, rare)
    return Comparison(runs, predictions, *told, settings, judge)


def _train_all(
    trainings: list[Training],
    remedies: dict[str, Remedy],
    judged: Samples,
    judge: Judge,
    rare: int,
    progress: bool,
) -> "tuple[pd.DataFrame, dict[str, Numbers]]":
    """Rows of numbers for every remedy and seed, and what they predict."""
    import pandas as pd

    predictions: dict[str, list[Numbers]] = {}
    rows: list[dict[str, Any]] = []

    def note(name: str, logits: Tensor, **more: Any) -> None:
        predictions.setdefault(name, []).append(logits.argmax(1).numpy())
        rows.append({"remedy": name, "seed": training.seed, **judge.measure(logits), **more})

    def rightly(decided: Tensor, labels: Tensor) -> float:
        """In the rarest class; NaN where nobody is of it."""
        own = labels == rare
        return float((decided[own].argmax(1) == rare).double().mean())

    steps = len(remedies) * len(trainings) * trainings[0].recipe.steps
    with progress_bar("", steps, progress) as advance:
        for i, training in enumerate(trainings):
            training.advance = advance
            for name, remedy in remedies.items():
                advance(0, f"seed {i + 1} of {len(trainings)}, {name}")
                training.spared, started = 0.0, time.perf_counter()
                fitted = remedy(training)
                seconds = time.perf_counter() - started + training.spared
                fitted = fitted if isinstance(fitted, Fitted) else Fitted(fitted)
                if not isinstance(fitted.model, nn.Module):
                    raise TypeError(f"remedies[{name!r}] gave {fitted.model!r}: expected a model")
                logits, of_train = (_decided(some, fitted) for some in (judged, training.samples))
                measured = {
                    "effective share": fitted.effective_share,
                    "time": seconds,
                    "rare, train": rightly(of_train, training.labels),
                    "rare, validation": rightly(logits, torch.from_numpy(judge.labels)),
                    "held": fitted.held,
                }
                note(name, logits, **measured)
            if "group" in judge.parts:
                note(ORACLE, oracle_logits(training, judged, judge.parts["group"]))
    runs = pd.DataFrame(rows).set_index(["remedy", "seed"])
    return runs, {name: np.stack(each) for name, each in predictions.items()}


def _chosen(remedies: Iterable[str] | Mapping[str, Remedy] | None) -> dict[str, Remedy]:
    if remedies is None:
        return REMEDIES
    if not isinstance(remedies, Mapping):
        asked = [remedies] if isinstance(remedies, str) else list(remedies)
        if unknown := [name for name in asked if name not in REMEDIES]:
            raise ValueError(
                f"remedies={asked!r}: {unknown[0]!r} is none; expected some of {list(REMEDIES)}, "
                "or {name: remedy} for one of your own"
            )
        remedies = {name: REMEDIES[name] for name in asked}
    for name, remedy in remedies.items():
        if name == ORACLE or not callable(remedy):
            raise TypeError(
                f"remedies[{name!r}]={remedy!r}: expected a function of a Training, and a name "
                f"other than {ORACLE!r}"
            )
    return {PLAIN: REMEDIES[PLAIN], **remedies}


def _made(name: str, make: Any, of: str, *given: Any) -> Any:
    try:
        made = make(*given)
        signature(made.step).bind()
    except Exception as error:
        raise TypeError(f"{name}={make!r} ({error}): expected a function of {of}") from error
    return made


def _decided(samples: Samples, fitted: Fitted) -> Tensor:
    logits = logits_of(samples.read(fitted.model)[0], samples.criterion)
    return logits if fitted.shift is None else logits + fitted.shift


def _named(made: Any) -> str:
    if made is None:
        return "constant learning rate"
    if isinstance(made, partial):
        return f"{_named(made.func)}({', '.join(f'{k}={v}' for k, v in made.keywords.items())})"
    return str(getattr(made, "__name__", type(made).__name__))
