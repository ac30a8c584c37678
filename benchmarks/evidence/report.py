"""Writes what the documentation shows: tables, verdicts and figures, from the stored runs.

`fragments` is the whole text; a test compares it with the files, so that no number can drift.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.evidence import analysis, tables, unseen
from benchmarks.evidence.analysis import ACCURACY, Target, best, marked, mean_change
from benchmarks.evidence.claims import claims
from benchmarks.evidence.dots import BLUE, GREEN, ORANGE, PURPLE, Look, Row, draw_rows
from benchmarks.evidence.grid import PLAIN
from benchmarks.evidence.sweep import NOISES, RESULTS
from benchmarks.evidence.tables import METHODS


def fragments(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated text by the name of its file."""
    found, verdicts = analysis.targets(folder), claims(folder)
    people = analysis.protected(folder)
    search, slow = (folder.with_name(f"fairness_{kind}") for kind in ("search", "slow"))
    return {
        "headroom.md": tables.headroom_table(folder),
        "protected.md": tables.protected_table(folder),
        "confirmed.md": tables.confirmed(found),
        "claims.md": "".join(claim.markdown() for claim in verdicts),
        "summary.md": "| claim | verdict |\n| --- | --- |\n"
        + "".join(f"| {claim.says} | {claim.verdict} |\n" for claim in verdicts),
        "seeds.md": about_the_runs(found),
        "facts_headroom.md": headroom_in_words(people, found),
        "facts_not.md": by_groups_of_people(people),
        "noise.md": tables.noise_table(folder, NOISES),
        "search.md": tables.search_table(search),
        "slow.md": tables.headroom_table(slow),
        "slow_confirmed.md": tables.confirmed(analysis.targets(slow)),
    }


def about_the_runs(found: list[Target]) -> str:
    """Which seeds, and how large the spread between them is."""
    said = "; ".join(
        f"{t.title}: {', '.join(map(str, sorted(t.plain().index.tolist())))}" for t in found
    )
    plain = "; ".join(f"{t.title} {analysis.percent(t.plain()[ACCURACY].mean())}" for t in found)
    return f"Seeds. {said}.\n\nAccuracy of plain training, in %: {plain}.\n"


def headroom_in_words(people: Sequence[Target], with_label: Sequence[Target]) -> str:
    """What an oracle gains, in points."""
    text = ""
    for kind, found in (("Groups of people", people), ("Other groups", with_label)):
        cells = "; ".join(f"{t.title} {marked(t.headroom())}" for t in found)
        text += f"- {kind}, oracle minus plain, in points: {cells}.\n"
    return text


def by_groups_of_people(found: Sequence[Target]) -> str:
    """The best and the worst method on groups of people."""
    changes = {m: mean_change(found, best(m)) for m in METHODS if m != PLAIN}
    ahead = max(changes, key=lambda m: changes[m].mean)
    clearly = sum(change.verdict == "higher" for change in changes.values())
    return (
        f"- **No better service of groups of people** where the oracle finds no headroom: over "
        f"{len(found)} data sets, {clearly} of {len(changes)} methods clearly raised the worst "
        f"group of people; the best on average, {ahead}, changed it by {marked(changes[ahead])} "
        f"points, IRW as in the paper by {marked(changes['IRW'])}.\n"
    )


# Figures --------------------------------------------------------------------------------------


def dots(
    name: str,
    rows: Sequence[Row],
    looks: Mapping[str, Look],
    says: str,
    left: float | None = None,
    legend: int = 2,
) -> None:
    """In points, and as wide as a telephone shows without making the letters small."""
    height = 1.0 + sum(0.1 + 0.11 * max(1, len(row.dots)) for row in rows)
    with report.figure(name, 1, 1, (4.6, height), 180, legend) as ((axis,),):
        draw_rows(axis, rows, looks, left=left)
        axis.figure.suptitle(says, fontsize=9.5, fontweight="bold")


def headroom(seen: Path, unseen_runs: Path) -> None:
    """What training that knows the groups gains, target by target."""
    looks = {"developed on": BLUE, "unseen": ORANGE}

    def by_size(*found: Sequence[Target]) -> list[Row]:
        both = zip(looks, found, strict=True)
        rows = [Row(t.title, {kind: t.headroom()}) for kind, own in both for t in own]
        return sorted(rows, key=lambda row: -next(iter(row.dots.values())).mean)

    people = analysis.protected(seen), unseen.alone(unseen_runs)
    others = analysis.targets(seen), analysis.targets(unseen_runs, tasks=unseen.UNSEEN)
    rows = [Row("Groups of people alone"), *by_size(*people)]
    rows += [Row("Label × group, shortcuts"), *by_size(*others)]
    says = "Headroom: what training that is told the groups\ngains for the worst one, in points"
    dots("headroom.png", rows, looks, says)


def prices(folder: Path) -> None:
    """What remedies take from accuracy, and from the worst group of people alone."""
    looks = {"accuracy of everybody": BLUE, "worst group of people alone": ORANGE}
    natural, people = unseen.natural(folder), unseen.alone(folder)
    rows = []
    for name, pick in unseen.PICKS.items():
        both = mean_change(natural, pick, ACCURACY), mean_change(people, pick)
        rows.append(Row(name, dict(zip(looks, both, strict=True))))
    says = "What a remedy takes, on unseen data:\nchange against plain training, in points"
    dots("prices.png", rows, looks, says)


def where(found: Sequence[Target]) -> None:
    """Two stages and others against class balancing, target by target."""
    looks = {"two stages": BLUE, "control (losses)": GREEN, "IRW": ORANGE}
    names = ("two stages, a fifth", "control (losses), a fifth", "IRW, as in the paper")
    rows = []
    for t in found:
        each = (unseen.against_balancing(t, name) for name in names)
        rows.append(Row(t.title, dict(zip(looks, each, strict=True))))
    rows.sort(key=lambda row: -row.dots["two stages"].mean)
    says = "The worst group of each unseen target,\nagainst class balancing, in points"
    dots("where.png", rows, looks, says, left=-52, legend=3)


def wrong_labels(folder: Path, noises: Sequence[float]) -> None:
    """What remedies gain as more labels are wrong."""
    found = tables.with_most_flips(folder, noises)
    looks = (BLUE, GREEN, PURPLE, ORANGE)
    kinds = {f"{n:.0%} wrong": look for n, look in zip(noises, looks, strict=True)}
    rows = []
    for name in tables.with_flips(found):
        changes = [mean_change(some, best(name)) for some in found]
        rows.append(Row(name, dict(zip(kinds, changes, strict=True))))
    rows.sort(key=lambda row: -list(row.dots.values())[-1].mean)
    says = "The worst group with wrong labels in training,\nagainst plain training, in points"
    dots("wrong_labels.png", rows, kinds, says, legend=4)


def draw() -> None:
    """All of them, from what is stored."""
    headroom(RESULTS, unseen.RESULTS)
    prices(unseen.RESULTS)
    where(unseen.with_headroom(unseen.RESULTS))
    wrong_labels(RESULTS, NOISES)


def main(given: Sequence[str]) -> None:
    for name, text in fragments().items():
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(RESULTS / name)
    draw()
