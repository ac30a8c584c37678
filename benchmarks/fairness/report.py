"""Writes what the documentation shows: tables, verdicts and figures, from the stored runs.

    python -m benchmarks.fairness.report

`fragments` is the whole text; a test compares it with the files, so that no number can drift.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.fairness.analysis import (
    Target,
    protected,
    targets,
    with_setting,
)
from benchmarks.fairness.claims import claims
from benchmarks.fairness.facts import facts
from benchmarks.fairness.grid import PLANTED, varied
from benchmarks.fairness.single import (
    about_leaving_out,
    about_one_setting,
    confirmed,
    noise_of_one_setting,
    search_table,
)
from benchmarks.fairness.sweep import NOISES, RESULTS
from benchmarks.fairness.tables import (
    IRW,
    OTHERS,
    first_five,
    headroom_table,
    markdown,
    marked,
    metrics_table,
    noise_table,
    noisy_targets,
    percent,
    protected_table,
    settings_table,
    spread,
    title,
)

FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def fragments(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated text by the name of its file."""
    found = targets(folder)
    five = first_five(found)
    texts = {
        "headroom.md": headroom_table(folder),
        "protected.md": protected_table(folder),
        "metrics.md": "".join(
            f"**{title(t)}**, {len(t.plain())} seeds\n\n{metrics_table(t)}\n"
            for t in protected(folder)
        ),
        "settings.md": settings_table(five, settings_to_show(five)),
        "confirmed.md": confirmed(found),
        "left_out.md": about_leaving_out(five),
        "one_setting.md": about_one_setting(five),
        "varied.md": varied_table(folder),
        "claims.md": "".join(claim.markdown() for claim in claims(folder)),
        "summary.md": summary(folder),
        "seeds.md": about_the_runs(found),
        **facts(folder),
    }
    if noisy_targets(folder, max(NOISES)):
        texts["noise.md"] = noise_table(folder, NOISES)
        texts["noise_of_one_setting.md"] = noise_of_one_setting(folder, NOISES)
    search = folder.with_name("fairness_search")
    if search.exists():
        texts["search.md"] = search_table(search)
    slow = folder.with_name("fairness_slow")
    if slow.exists():
        texts["slow.md"] = headroom_table(slow)
        texts["slow_confirmed.md"] = confirmed(targets(slow))
        texts["slow_one_setting.md"] = about_one_setting(first_five(targets(slow)))
    return texts


def settings_to_show(five: list[Target]) -> list[str]:
    """The best by the score without groups, of those of IRW and of the others."""
    runs = pd.concat([t.runs for t in five])
    runs = runs[runs["method"].isin((*IRW, *OTHERS))]
    score = runs.groupby("setting")["score without groups"].mean().sort_values(ascending=False)
    return list(score.index[:12])


def varied_table(folder: Path) -> str:
    """Headroom recovered where the structure is planted, by α, warm-up and mix."""
    planted = [t for t in targets(folder) if t.task in PLANTED]
    names = [s.name for s in varied() if (planted[0].runs["setting"] == s.name).any()]
    head = ["α, warm-up, mix", *map(title, planted)]
    lines = [
        [name.partition(": ")[2], *(spread(t.recovered(with_setting(t, name))) for t in planted)]
        for name in names
    ]
    return markdown(head, lines)


def summary(folder: Path) -> str:
    """The verdicts at a glance."""
    lines = ["| claim | verdict |", "| --- | --- |"]
    lines += [f"| {claim.says} | {claim.verdict} |" for claim in claims(folder)]
    return "\n".join(lines) + "\n"


def about_the_runs(found: list[Target]) -> str:
    """Which seeds, and how large the spread between them is."""
    seeds = {title(t): sorted(t.plain().index.tolist()) for t in found}
    said = "; ".join(f"{name}: {', '.join(map(str, own))}" for name, own in seeds.items())
    headroom = "; ".join(f"{title(t)} {marked(t.headroom())}" for t in found)
    plain = "; ".join(f"{title(t)} {percent(t.plain()['test accuracy'].mean())}" for t in found)
    return (
        f"Seeds. {said}.\n\nHeadroom, in points with 95 % t intervals: {headroom}.\n\n"
        f"Accuracy of plain training, in %: {plain}.\n"
    )


def main() -> None:
    for name, text in fragments().items():
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(RESULTS / name)
    from benchmarks.fairness.figures import draw

    for path in draw(RESULTS, FIGURES):
        print(path)


if __name__ == "__main__":
    main()
