"""The known ways in which reweighted training fails, each as a function of its course.

They are judged on the later half of the weighted steps, by medians, so that single batches and the
beginning do not decide; the two about the worst-off loss look at the whole course.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from .rows import Course, blocks, column, mean, medians, parts_of

ENOUGH = 20
"""Weighted rows before anything is said, and removed samples before it is said who they are."""


@dataclass(frozen=True)
class Finding:
    """One way in which the training fails; ``print(finding)`` shows it.

    Attributes:
        name: as in the table of ``docs/diagnostics.md``.
        says: what was seen, with the figures in it.
        figures: the figures alone, by name.
        advice: what to change.

    >>> print(Finding("few_worst_off", "S has 2 samples.", {"worst_off_samples": 2.0}, "More."))
    few_worst_off: S has 2 samples.
      What to change: More.
    """

    name: str
    says: str
    figures: dict[str, float]
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.says}\n  What to change: {self.advice}"


def diagnose(course: Course) -> list[Finding]:
    """All findings, in the order of `SIGNATURES`."""
    if (seen := len(course.weighted)) < ENOUGH:
        return [
            Finding(
                "too_few_records",
                f"{seen} weighted steps are recorded, and {ENOUGH} are needed to say anything.",
                {"rows": float(seen)},
                "train on, or record more often with IRWMonitor(..., every=1).",
            )
        ]
    return [finding for signature in SIGNATURES for finding in signature(course)]


def worst_off_loss(course: Course) -> Iterator[Finding]:
    """The objective itself, the mean of the worst losses, does not fall."""
    if course.rows[-1].numbers["resampled"]:
        return  # a batch is drawn from those who were badly off, each time other ones
    losses = column(course.rows, "worst_alpha_loss")
    start = float(losses[:3].mean())
    floor = 0.05 * start + 1e-12  # below it a loss is as good as none
    # Ratios, so that one exploded batch does not drown all others.
    levels, error = blocks(np.log(losses + floor), min(10, len(losses) // 4))
    now, best, first = levels[-1], levels.min(), np.log(start + floor)
    lowest, latest = float(np.exp(best) - floor), float(np.exp(now) - floor)
    figures = {"start": start, "lowest": lowest, "now": latest}
    numbers = f"{start:.3g} at the start, {lowest:.3g} at the lowest, {latest:.3g} now"
    # More than a tenth, since less is no news, and than three errors of a difference; twice as much
    # is news also where the last batches exploded and scatter.
    if now - min(best, first) > max(0.1, min(3 * 2**0.5 * error, np.log(2))):
        yield Finding(
            "worst_off_loss_rises",
            f"the mean of the worst losses of a batch went up: {numbers}.",
            figures,
            "a smaller learning rate or a larger alpha, and warmup_steps; a smaller center; "
            "where labels may be wrong, mix=0.5 or more, since reweighting chases them.",
        )
    elif now > first - 0.1:
        yield Finding(
            "worst_off_loss_plateaus",
            f"the mean of the worst losses of a batch has not fallen by a tenth: {numbers}.",
            figures,
            "if the mean loss stands still as well, a larger model or learning rate; if it falls, "
            "the worst-off cannot be told apart or are mislabelled: better data, or larger alpha.",
        )


def one_class(course: Course) -> Iterator[Finding]:
    """Nearly all of a batch's weight lies on one class."""
    classes, shares = [], []
    for row in course.recent:
        if table := row.breakdowns.get("class"):
            weights, samples = table.column("weight"), table.column("samples")
            heaviest = max(weights, key=weights.__getitem__)
            classes.append(heaviest)
            shares.append((weights[heaviest], weights[heaviest] - samples[heaviest]))
    weight, excess = np.median(shares, axis=0).tolist() if classes else (0.0, 0.0)
    if weight >= 0.9 and excess >= 0.2:
        usual = max(set(classes), key=classes.count)
        often = classes.count(usual) / len(classes)
        which = f"class {usual} in {often:.0%} of the steps"
        yield Finding(
            "weight_on_one_class",
            f"in the median step {weight:.0%} of the weight lies on one class, {which}, "
            f"which has {weight - excess:.0%} of the samples.",
            {"weight": weight, "samples": weight - excess, "usual_class_share": often},
            "class_balance=True, which gives every class the same weight, or mix=0.5. Gradients of "
            "a class resemble each other, so most who help S are of its majority's class.",
        )


def few_samples(course: Course) -> Iterator[Finding]:
    """A handful of samples decides a step."""
    effective, share, largest, size = medians(
        course.recent, "effective_samples", "effective_share", "largest_weight", "samples"
    )
    if size >= 4 and ((effective < 5 and share < 0.2) or largest > 0.5):
        yield Finding(
            "weight_on_few_samples",
            f"the median step counts as {effective:.1f} of {size:.0f} samples, and one sample has "
            f"{largest:.0%} of its weight.",
            {"effective_samples": effective, "effective_share": share, "largest_weight": largest},
            "a larger batch or alpha, accumulation_steps, or mix=0.5; if a few gradients are far "
            "above all others, look at these samples, and at outliers=DBSCANFilter().",
        )


def few_worst_off(course: Course) -> Iterator[Finding]:
    """S is one or two samples: its gradient is theirs."""
    if not (local := course.recent_with(held=False)):
        return
    members, size = medians(local, "worst_off_samples", "samples")
    if 0 < members < 3:
        yield Finding(
            "few_worst_off",
            f"the worst-off of the median batch are {members:.0f} of {size:.0f} samples, whose "
            "gradients alone give the direction.",
            {"worst_off_samples": members, "samples": size},
            "batch size times alpha should be 3 at least, better 10: a larger batch, "
            "accumulation_steps, a larger alpha, or irw_optim.schemes.GlobalScheme.",
        )


def gradients_vanished(course: Course) -> Iterator[Finding]:
    """There is nothing to weigh by, and it is not because everything is learned."""
    fallback = mean(course.recent_with(held=False), "fallback")
    tenth = max(1, len(course.rows) // 10)
    norms, losses = column(course.rows, "gradient_norm"), column(course.rows, "worst_alpha_loss")
    first, now = float(np.median(norms[:tenth])), float(np.median(norms[-tenth:]))
    # Training on what is learned already has small gradients too, but small losses as well.
    learned = np.median(losses[-tenth:]) < 0.5 * losses[:3].mean()
    if fallback >= 0.05 or not (learned or now > 1e-3 * first):
        yield Finding(
            "gradients_vanished",
            f"no sample had a positive score in {fallback:.0%} of the later steps, whose weights "
            f"were uniform; the gradient's norm was {first:.2g} at first and is {now:.2g} now.",
            {"fallback": fallback, "norm_at_first": first, "norm_now": now},
            "saturated outputs and dead units have no gradient: a smaller learning rate, a "
            "criterion on logits (BCEWithLogitsLoss), normalisation layers; score_parameters that "
            "are not frozen.",
        )


def batches_without_weight(course: Course) -> Iterator[Finding]:
    """The weights of a global scheme leave whole batches without any."""
    fallback = mean(course.recent_with(held=True), "fallback")
    if fallback >= 0.05:
        yield Finding(
            "batches_without_weight",
            f"in {fallback:.0%} of the later batches nobody has a weight of the global scheme, and "
            "plain averages were taken.",
            {"fallback": fallback},
            'larger batches, mix=0.25 or more, or use="resampling", which draws by the weights.',
        )


def removes_many(course: Course) -> Iterator[Finding]:
    """The outlier filter takes more than noise."""
    removed = mean(course.recent, "removed_share")
    if removed > 0.1:  # eps="auto" removes at most 5 %
        yield Finding(
            "filter_removes_many",
            f"the outlier filter removes {removed:.0%} of the samples.",
            {"removed": removed},
            'DBSCANFilter(eps="auto"), whose quantile bounds the share; a fixed eps does not '
            "survive training, since gradients shrink.",
        )


def removes_one(course: Course, kind: str) -> Iterator[Finding]:
    """The outlier filter takes mostly one class, or one group."""
    parts = parts_of(course.weighted, kind)
    removed = {name: part.removed * part.seen for name, part in parts.items()}
    total = sum(removed.values())
    if total < ENOUGH or len(parts) < 2:
        return
    name = max(removed, key=removed.__getitem__)
    others = sum(part.seen for part in parts.values()) - parts[name].seen
    rate, rate_of_others = parts[name].removed, (total - removed[name]) / others
    share = removed[name] / total
    # Mostly: over half of the removed, and at three times the rate of everybody else.
    if share >= 0.5 and rate >= 3 * rate_of_others:
        yield Finding(
            f"filter_removes_one_{kind}",
            f"{share:.0%} of the samples that the outlier filter removed are of {kind} {name}: "
            f"{rate:.1%} of that {kind}, and {rate_of_others:.1%} of the others.",
            {"share_of_removed": share, "rate": rate, "rate_of_others": rate_of_others},
            "a minority looks like noise to the filter: leave outliers=None, or raise its quantile "
            f"towards 1, and look whether these samples of {kind} {name} are broken.",
        )


def worst_group_underweighted(course: Course) -> Iterator[Finding]:
    """Those who need it most get less than an equal say."""
    groups = {g: p for g, p in parts_of(course.recent, "group").items() if p.seen >= 50}
    if len(groups) < 2:
        return
    name, worst = max(groups.items(), key=lambda item: item[1].loss)
    if worst.weight < 0.8 * worst.samples:
        yield Finding(
            "worst_group_underweighted",
            f"group {name} has the largest mean loss, {worst.loss:.3g}, and {worst.samples:.1%} of "
            f"the samples, but {worst.weight:.1%} of the weight.",
            {"loss": worst.loss, "samples": worst.samples, "weight": worst.weight},
            "what helps the worst-off samples is not what this group needs: center=1 after "
            "warmup_steps, class_balance=True, an alpha nearer to the group's share, or "
            'weighting="uniform".',
        )


def stale_weights(course: Course) -> Iterator[Finding]:
    """Those whom a global scheme holds for the worst off are so no longer."""
    held = [row for row in course.recent if not np.isnan(row.numbers["held_agreement"])]
    if not held:
        return
    ages, agreements = column(held, "held_for"), column(held, "held_agreement")
    old = ages >= np.median(ages)
    now, age = float(np.median(agreements[old])), float(np.median(ages[old]))
    if now < 0.75:  # halfway between a coin's 1/2 and a perfect 1
        yield Finding(
            "stale_weights",
            f"weights held for {age:.0f} steps no longer say who is worst off: somebody in S has "
            f"the larger loss of a pair in {now:.0%} of the pairs (50 % by chance).",
            {"held_for": age, "agreement": now},
            'renew more often, for example GlobalScheme(..., refresh=10, unit="steps"), or use the '
            "local scheme, which decides in each batch.",
        )


SIGNATURES: tuple[Callable[[Course], Iterator[Finding]], ...] = (
    worst_off_loss,
    one_class,
    few_samples,
    few_worst_off,
    gradients_vanished,
    batches_without_weight,
    removes_many,
    partial(removes_one, kind="class"),
    partial(removes_one, kind="group"),
    worst_group_underweighted,
    stale_weights,
)
