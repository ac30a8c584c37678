"""The pages about stacks: every diff runs before and after, and the other code as well."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import BATCH, FEATURES, Net, make_data, make_loader, make_model
from torch import nn

from irw_optim import IRWOptimizer

PAGES = Path(__file__).parents[2] / "docs" / "stacks"

NEEDS = {
    "lightning": "lightning",
    "accelerate": "accelerate",
    "transformers": "transformers",
    "peft": "peft",
    "skorch": "skorch",
    "sklearn": "skorch",
}

QUIET = {
    "lightning": {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    },
    "transformers": {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    },
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about themselves


def diffs(page: str) -> list[str]:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```diff\n(.*?)```", text, re.DOTALL)


CASES = [
    (page.stem, number)
    for page in sorted(PAGES.glob("*.md"))
    for number in range(len(diffs(page.stem)))
]


def side(diff: str, sign: str) -> str:
    return "\n".join(line[2:] for line in diff.splitlines() if line[:1] in (" ", sign, ""))


def names_for(page: str, path: Path) -> dict[str, Any]:
    """What a page takes for granted."""
    x, y = make_data()
    names = {
        "torch": torch,
        "IRWOptimizer": IRWOptimizer,
        "model": make_model(),
        "criterion": nn.CrossEntropyLoss(),
        "loader": make_loader(),
        "backend": "eager",
        "path": str(path / "checkpoint"),
        "quiet": QUIET.get(page, {}),
        "Net": Net,
        "x": x.numpy(),
        "y": y.numpy(),
    }
    if page == "transformers":
        from test_transformers import Sentences, classifier

        names.update(model=classifier(), dataset=Sentences())
    return names


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    gc.collect()


def steps_taken() -> int:
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) is IRWOptimizer]
    return sum(optimizer.steps for optimizer in found)


@pytest.mark.parametrize(("page", "number"), CASES)
@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_the_script_runs(page: str, number: int, sign: str, tmp_path: Path) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    diff = diffs(page)[number]
    names = names_for(page, tmp_path)
    already_wrapped = "IRWOptimizer" in side(diff, "-")
    before = steps_taken()
    exec(side(diff, sign), names)
    wrapped = sign == "+" or already_wrapped
    assert (steps_taken() > before) == wrapped
    if page == "transformers":
        return
    for name in ("model", "adapted", "prepared"):
        if name in names:
            assert all(torch.isfinite(p).all() for p in names[name].parameters())


def test_the_other_code_runs(tmp_path: Path) -> None:
    text = (PAGES / "plain.md").read_text(encoding="utf-8")
    names = names_for("plain", tmp_path)
    exec(side(diffs("plain")[0], "+"), names)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["checkpoint"]["optimizer"]["irw"]["steps"] == names["optimizer"].steps > 0


def test_every_page_is_in_the_table_and_every_stack_has_a_page() -> None:
    table = (PAGES / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\((\w+)\.md\)", table))
    assert linked == {page.stem for page in PAGES.glob("*.md")} - {"index"}
    assert {page for page, _ in CASES} == linked


def test_the_setup_is_that_of_the_other_tests() -> None:
    (x, _), *_ = make_loader()
    assert x.shape == (BATCH, FEATURES)
