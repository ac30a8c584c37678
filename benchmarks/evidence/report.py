"""Writes what the documentation shows: tables, verdicts and figures, from the stored runs.

    python -m benchmarks.evidence report

`fragments` is the whole text; a test compares it with the files, so that no number can drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import pictures, tables
from benchmarks.evidence.analysis import (
    ACCURACY,
    Target,
    best,
    mean_change,
    noisy_targets,
    protected,
    targets,
)
from benchmarks.evidence.claims import claims
from benchmarks.evidence.grid import PLAIN
from benchmarks.evidence.single import confirmed, search_table
from benchmarks.evidence.sweep import NOISES, RESULTS
from benchmarks.evidence.tables import METHODS, marked, percent


def fragments(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated text by the name of its file."""
    found, verdicts, people = targets(folder), claims(folder), protected(folder)
    texts = {
        "headroom.md": tables.headroom_table(folder),
        "protected.md": tables.protected_table(folder),
        "confirmed.md": confirmed(found),
        "claims.md": "".join(claim.markdown() for claim in verdicts),
        "summary.md": "| claim | verdict |\n| --- | --- |\n"
        + "".join(f"| {claim.says} | {claim.verdict} |\n" for claim in verdicts),
        "seeds.md": about_the_runs(found),
        "facts_headroom.md": headroom(people, found),
        "facts_not.md": by_groups_of_people(people),
    }
    if noisy_targets(folder, max(NOISES)):
        texts["noise.md"] = tables.noise_table(folder, NOISES)
    search, slow = (folder.with_name(f"fairness_{kind}") for kind in ("search", "slow"))
    if search.exists():
        texts["search.md"] = search_table(search)
    if slow.exists():
        texts["slow.md"] = tables.headroom_table(slow)
        texts["slow_confirmed.md"] = confirmed(targets(slow))
    return texts


def about_the_runs(found: list[Target]) -> str:
    """Which seeds, and how large the spread between them is."""
    said = "; ".join(
        f"{t.title}: {', '.join(map(str, sorted(t.plain().index.tolist())))}" for t in found
    )
    plain = "; ".join(f"{t.title} {percent(t.plain()[ACCURACY].mean())}" for t in found)
    return f"Seeds. {said}.\n\nAccuracy of plain training, in %: {plain}.\n"


def headroom(people: Sequence[Target], with_label: Sequence[Target]) -> str:
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


def main(given: Sequence[str]) -> None:
    for name, text in fragments().items():
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(RESULTS / name)
    pictures.draw()
