"""Draws the stored results of this folder's benchmarks for the documentation."""

from typing import Any

import pandas as pd

from benchmarks import report

DATA = {"adult": "UCI Adult", "law": "Law School"}
CELL = "worst label x sex"


def variance() -> None:
    frame = report.stored("schemes_variance")
    names = list(frame["optimizer"].unique())
    with report.figure("schemes_variance.svg", 1, 2, (8.5, 3.2)) as (axes,):
        for axis, steps in zip(axes, (1, 10), strict=True):
            rows = frame[frame["updates"] == steps]
            for i, way in enumerate(("resampling", "reweighting", "normalised")):
                places = [j + 0.27 * (i - 1) for j in range(len(rows))]
                column = f"{way}: variance"
                axis.bar(places, rows[column], 0.25, yerr=rows[f"± {column}"], label=way)
            axis.set(yscale="log", ylim=(1e-3, 1), ylabel="variance / squared mean")
            axis.set_xticks(range(len(names)), names)
            axis.set_title("one update" if steps == 1 else f"{steps} updates in a row")


def summary(part: str, data: str) -> pd.DataFrame:
    frame = report.stored(f"schemes_choosing_{part}_{data}")
    return report.summarised(frame, ["setting"]).set_index("setting")


def line(axis: Any, x: pd.Series, rows: pd.DataFrame, key: str, **style: Any) -> None:
    """Mean and standard deviation, in percent."""
    own = rows.assign(x=x).sort_values("x")
    axis.errorbar(own["x"], 100 * own[key], 100 * own[f"± {key}"], capsize=2, **style)


def held() -> None:
    """Local against global, by how long the weights are held."""
    with report.figure("schemes_held.svg", 1, 2, (8.5, 3.2), sharey=True) as (axes,):
        for axis, (data, title) in zip(axes, DATA.items(), strict=True):
            rows = summary("schemes", data)
            for setting, style in (("local", "-"), ("plain", ":")):
                axis.axhline(100 * rows.loc[setting, CELL], color="black", ls=style, label=setting)
            for use, beside, marker in (("reweighting", 1.0, "o"), ("resampling", 1.06, "s")):
                held = rows.index.to_series().str.extract(
                    rf"{use}, every (\d+) steps", expand=False
                )
                steps, own = held.astype(float), held.notna()
                line(axis, beside * steps[own], rows[own], CELL, label=use, marker=marker)
            axis.set(xscale="log", xlabel="steps that the weights are held", title=title)
            report.ticks(axis, sorted(steps[own].astype(int)))
        axes[0].set_ylabel("worst label x sex accuracy, %")


def alpha() -> None:
    with report.figure("choosing_alpha.svg", 1, 2, (8.5, 3.4), sharey=True) as (axes,):
        for axis, (data, title) in zip(axes, DATA.items(), strict=True):
            rows = summary("alpha", data)
            plain, own = rows.loc["plain"], rows.drop("plain")
            x = pd.Series([float(name.split()[-1]) for name in own.index], own.index)
            for i, key in enumerate(("accuracy", "worst race x sex", CELL)):
                line(axis, x, own, key, label=key, color=f"C{i}", marker="os^"[i])
                axis.axhline(100 * plain[key], color=f"C{i}", ls=":")
            error = 1 - plain["accuracy"]
            axis.axvline(error, color="gray", lw=0.8)
            look = {"color": "gray", "fontsize": 8, "transform": axis.get_xaxis_transform()}
            axis.text(error, 0.03, " error rate", **look)
            axis.set(xscale="log", xlabel="α", title=f"{title} (dotted: plain training)")
            report.ticks(axis, (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1))
        axes[0].set_ylabel("%")


def main(given: list[str]) -> None:
    for draw in (variance, held, alpha):
        draw()
