"""What is compared: each method with the settings it may choose from.

A name says all of a setting: the results are stored under it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.data.tasks import Task
from benchmarks.methods import stages
from benchmarks.methods.intrinsic import Global, Intrinsic
from benchmarks.methods.objectives import (
    arl,
    chi_square,
    class_balanced,
    group_balanced,
    group_dro,
    plain,
)
from benchmarks.methods.stages import JTT, ClassByClass, InClasses
from benchmarks.training import Method
from irw_optim import DBSCANFilter

PLAIN = "plain"
MOVED = "plain, moved threshold"
ORACLES = ("group balancing", "GroupDRO")
"""Methods that are told the groups of a grouping: for each one they are trained anew."""
CLASS_BY_CLASS, EARLY_LOSSES = "IRW class by class, held", "early losses, class by class"
"""Two stages with the score of IRW, and with the loss in its place."""
CENTRED = "IRW, warm-up, center: α 0.3, center 1"
WARM = 1 / 3


@dataclass(frozen=True)
class Setting:
    """One way to train and to decide, with a name of its own among those of its method.

    It may be ``told`` the groups of a grouping, have its decision threshold ``moved`` by some
    strength, and take a share of the recipe's ``steps``.
    """

    method: str
    name: str
    how: Method
    told: str = ""
    moved: float = 0.0
    steps: float = 1.0


def irw(method: str, alpha: float, warm_up: float = 0.0, **options: Any) -> Setting:
    """The method with these options; those that are numbers are named."""
    said = "".join(f", {k} {v:g}" for k, v in options.items() if type(v) is float)
    return Setting(method, f"{method}: α {alpha:g}{said}", Intrinsic(alpha, warm_up, options))


def class_by_class(alpha: float, mix: float, early: float) -> Setting:
    """Two stages, with IRW's weights inside each class."""
    name = f"{CLASS_BY_CLASS}: α {alpha:g}, mix {mix:.2f}, early {early:g}"
    return Setting(CLASS_BY_CLASS, name, ClassByClass(stages.intrinsic(alpha), early, mix))


def early_losses(mix: float, early: float) -> Setting:
    """Two stages, with the early model's losses as weights inside each class."""
    name = f"{EARLY_LOSSES}: mix {mix:.2f}, early {early:g}"
    return Setting(EARLY_LOSSES, name, ClassByClass(stages.BY_LOSS, early, mix))


FIXED = class_by_class(0.5, 0.5, 0.1).name
ON_CLEAN = class_by_class(0.5, 0.5, 0.2).name
"""The setting for all data sets, found by `searched` on seeds of its own; and what clean labels by
themselves would have chosen. See `tables`."""


def without_groups() -> Iterator[Setting]:
    """The settings of all methods that are told no group, the cheap and the central ones first."""
    yield Setting(PLAIN, PLAIN, plain())
    for strength in (0.5, 1.0, 1.5):
        yield Setting(MOVED, f"{MOVED}: {strength:g}", plain(), moved=strength)
    yield Setting("class-balanced", "class-balanced", class_balanced())
    for mix in (0.0, 0.5):
        yield irw("CVaR, warm-up", 0.3, WARM, weighting="cvar", mix=mix)
    yield Setting("χ²-DRO, warm-up", "χ²-DRO, warm-up: α 0.5", chi_square(0.5, WARM))
    for lr in (0.01, 0.1):
        yield Setting("ARL", f"ARL: lr {lr:g}", arl(lr))
    for early, times in ((0.2, 5), (0.1, 20)):
        yield Setting("JTT", f"JTT: early {early:g}, times {times}", JTT(early, times))
    balanced = JTT(0.2, 5, class_balance=True)
    yield Setting("JTT, class-balanced", "JTT, class-balanced: early 0.2, times 5", balanced)
    for early in (0.1, 0.2):
        yield early_losses(0.5, early)
    for alpha, mix, early in ((0.5, 0.5, 0.1), (0.1, 2 / 3, 0.1), (0.5, 0.5, 0.2)):
        yield class_by_class(alpha, mix, early)
    for early, center, floor in ((0, 0, 1), (0.2, 0, 1), (0.2, 1, 1), (0.1, 1, 1), (0.1, 0.5, 0.5)):
        method = "IRW in classes, early S" if early else "IRW in classes"
        name = f"{method}: α 0.2, center {center:g}, floor {floor:g}"
        name += f", early {early:g}" if early else ""
        yield Setting(method, name, InClasses(0.2, early, center, floor))
    for alpha in (0.1, 0.3):
        yield irw("IRW", alpha)
    for alpha in (0.1, 0.3):
        yield irw("IRW, warm-up", alpha, WARM)
    for alpha in (0.1, 0.3):
        yield irw("IRW, warm-up, class_balance", alpha, WARM, class_balance=True)
    for center in (0.5, 1.0):
        yield irw("IRW, warm-up, center", 0.3, WARM, center=center)
    yield irw("IRW, warm-up, center, mix", 0.3, WARM, center=1.0, mix=0.5)
    yield irw("IRW, last layer", 0.3, 0.0, score_parameters="last")
    yield irw("IRWO", 0.3, 0.0, outliers=DBSCANFilter())
    for use in ("reweighting", "resampling"):
        method = f"IRW, global {use}"
        yield Setting(method, f"{method}: α 0.3", Global(Intrinsic(0.3), use))


def told_the_groups(task: Task, targets_only: bool = False) -> Iterator[Setting]:
    """The upper bounds, for each grouping that counts: both where there is headroom."""
    people = () if targets_only else (task.protected,)
    for grouping in dict.fromkeys((*task.targets, *people)):
        balanced, robust = (f"{method}, {grouping}" for method in ORACLES)
        yield Setting(ORACLES[0], balanced, group_balanced(grouping), grouping)
        if grouping in task.targets:
            yield Setting(ORACLES[1], robust, group_dro(grouping, 0.1), grouping)


PLANTED = ("coloured_digits", "marked_adult")
NOISY = ("adult", "law_school")
_BOTH = {PLAIN, MOVED, "class-balanced", "CVaR, warm-up", "JTT", "JTT, class-balanced"}
_BOTH |= {EARLY_LOSSES, CLASS_BY_CLASS, "IRW", "IRW, warm-up, center"}
UNDER_NOISE = _BOTH | {"IRW in classes", "IRWO"}
"""The methods that are tried with flipped labels too, on the tasks `NOISY`."""
SLOWLY = _BOTH | {"IRW in classes, early S", "IRW, warm-up, class_balance"}
SLOWLY |= {"IRW, warm-up, center, mix"}
"""The methods that are tried with the slow recipe too."""


def settings_of(task: Task, noise: float = 0.0) -> Iterator[Setting]:
    """All that is run of a task."""
    if noise and task.name not in NOISY:
        return
    yield from (s for s in without_groups() if not noise or s.method in UNDER_NOISE)
    yield from told_the_groups(task)


def slowly(task: Task, noise: float = 0.0) -> Iterator[Setting]:
    """What is run of a task with the slow recipe: is it the recipe?"""
    yield from (setting for setting in without_groups() if setting.method in SLOWLY)
    yield from told_the_groups(task, targets_only=True)


def searched(task: Task, noise: float = 0.0) -> Iterator[Setting]:
    """What the setting for all data sets was searched among, on seeds of its own."""
    for early in (0.1, 0.2):
        for mix in (1 / 2, 2 / 3, 4 / 5):
            for alpha in (0.1, 0.2, 0.3, 0.5):
                yield class_by_class(alpha, mix, early)
            yield early_losses(mix, early)
    if not noise:
        yield Setting(PLAIN, PLAIN, plain())
        yield from told_the_groups(task, targets_only=True)


HALF = "class-balanced, half the steps"
TRUSTED = "times trust in the label"


def unseen(task: Task, noise: float = 0.0) -> Iterator[Setting]:
    """What is run on unseen data: each method with the setting that it had before.

    The last two, a smaller S and the trust, were found on the data of the sweep.
    """
    fixed = (PLAIN, f"{MOVED}: 1", "class-balanced", "CVaR, warm-up: α 0.3, mix 0")
    fixed += ("JTT: early 0.2, times 5", "IRW: α 0.3", CENTRED)
    yield from (setting for setting in without_groups() if setting.name in fixed)
    yield Setting(HALF, HALF, class_balanced(), steps=0.5)
    for early in (0.2, 0.1):
        yield class_by_class(0.5, 0.5, early)
        yield early_losses(0.5, early)
        yield class_by_class(0.2, 0.5, early)
    for setting in (class_by_class(0.5, 0.5, 0.2), early_losses(0.5, 0.2)):
        method, name = (f"{said}, {TRUSTED}" for said in (setting.method, setting.name))
        yield Setting(method, name, replace(setting.how, trusted=True))
    yield from told_the_groups(task)
