"""The notebook of the examples: it runs, each cell may run twice, and it shows what it did."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

for needed in ("ipykernel", "nbclient", "matplotlib", "pandas", "fairlearn", "jinja2", "tqdm"):
    pytest.importorskip(needed, reason='needs the extras "dev" and "report"')
nbformat = importlib.import_module("nbformat")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

notebook = importlib.import_module("notebook")

# In a kernel, whose sockets and event loops are not ours to judge
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def kept():
    return notebook.read()


def code(of) -> list:
    return [cell for cell in of.cells if cell.cell_type == "code"]


def shortened(of):
    """The same cells, on fewer people and in fewer epochs."""
    for cell in code(of):
        for long, short in (
            ("12_000", "1_500"),
            ("epochs=8", "epochs=2"),
            ("epochs=4", "epochs=1"),
        ):
            cell.source = cell.source.replace(long, short)
    return of


def shown(cell) -> set[str]:
    return {kind for output in cell.outputs for kind in output.get("data", {output.output_type: 0})}


@pytest.fixture(scope="module")
def ran_twice():
    """Every cell, run and run again before the next."""
    twice = shortened(kept())
    twice.cells = [nbformat.from_dict(dict(cell)) for cell in twice.cells for _ in range(2)]
    for i, cell in enumerate(twice.cells):
        cell.id = f"cell-{i}"
    notebook.run(twice)
    return code(twice)


def test_every_cell_runs_and_runs_again(ran_twice) -> None:
    once, again = ran_twice[::2], ran_twice[1::2]
    assert [shown(cell) - {"stream"} for cell in once] == [
        shown(cell) - {"stream"} for cell in again
    ]


def test_the_kept_outputs_are_of_the_kinds_that_come_now(ran_twice) -> None:
    for now, before in zip(ran_twice[::2], code(kept()), strict=True):
        assert shown(before) <= shown(now), before.source


def test_python_says_nothing_on_stderr(ran_twice) -> None:
    said = [o.text for cell in ran_twice for o in cell.outputs if o.get("name") == "stderr"]
    assert not [text for text in said if "Warning" in text or "ipywidgets" in text]


def test_the_library_is_shown_in_html(ran_twice) -> None:
    """`last_step`, what verify says, the monitor, the comparison; and a figure, without pyplot."""
    ends = {ast.unparse(ast.parse(cell.source).body[-1]): shown(cell) for cell in ran_twice}
    for end in ("optimizer.last_step", "monitor", "result"):
        assert "text/html" in ends[end]
    assert "text/html" in next(kinds for end, kinds in ends.items() if end.startswith("verify("))
    assert "image/png" in ends["monitor.plot()"]


def test_a_cell_that_raises_fails() -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebook.run(broken)


def test_it_is_small_and_without_errors() -> None:
    assert notebook.NOTEBOOK.stat().st_size < 300_000
    assert all(cell.outputs or "def train" in cell.source for cell in code(kept()))
    assert "error" not in {output.output_type for cell in code(kept()) for output in cell.outputs}
