"""The dot plots show the numbers of the tables below them, in shapes and colours that differ."""

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.evidence import demo, dots, unseen
from benchmarks.evidence import report as pictures
from benchmarks.evidence.analysis import Estimate
from benchmarks.evidence.sweep import RESULTS
from benchmarks.evidence.tables import marked


@pytest.fixture(scope="module")
def drawn():
    """What each figure is made of: {name: (rows, looks)}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pictures,
            "dots",
            lambda name, rows, looks, *_, **__: found.update({name: (rows, looks)}),
        )
        pictures.draw()
    return found


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("headroom.png", [RESULTS / "facts_headroom.md"]),
        ("prices.png", [unseen.RESULTS / "people.md"]),
        ("where.png", [unseen.RESULTS / "where.md"]),
        ("wrong_labels.png", [RESULTS / "noise.md"]),
    ],
)
def test_dots_are_the_numbers_of_the_tables(drawn, name, texts):
    rows, looks = drawn[name]
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    kinds = {
        "headroom.png": ["developed on"],  # the others are in shares.md, by their ends
        "prices.png": ["worst group of people alone"],  # the other is in means.md, without interval
    }.get(name, looks)
    for row in rows:
        for kind in set(kinds) & set(row.dots):
            assert marked(row.dots[kind]) in text, (row.name, kind)


def test_kinds_differ_in_shape_and_in_colour(drawn):
    for _, looks in drawn.values():
        for part in zip(*looks.values(), strict=True):
            assert len(set(part)) == len(looks)
    for part in list(zip(*demo.LOOKS.values(), strict=True))[:3]:
        assert len(set(part)) == len(demo.LOOKS)


def test_what_lies_beyond_the_edge_is_an_arrow_with_its_number():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    dots._dot(axis, Estimate(-0.73, 0.01), 0.0, dots.BLUE, left=-52)
    assert axis.lines[0].get_xdata() == [-52]
    assert axis.texts[0].get_text() == "−73"


def test_figures_are_small(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", tmp_path)
    pictures.prices(unseen.RESULTS)
    demo.draw(report.stored("demo"))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 60_000
