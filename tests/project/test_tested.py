"""The page that names the test of each promise: every test and case that it names is there."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "tested.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and line != "|---|---|"
]
NAMED = re.findall(r"`([\w/]+\.py)((?:::\w+)*)`", PAGE)


def names_in(file: str) -> set[str]:
    """As pytest names them, without the file: `::TestClass::test_one`."""
    found = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(f"::{node.name}")
        elif isinstance(node, ast.ClassDef):
            if node.name.startswith("Test"):
                found.add(f"::{node.name}")
            found |= {
                f"::{node.name}::{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return {name for name in found if name.rpartition("::")[2].lower().startswith("test")}


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_the_named_tests_exist(file: str, test: str) -> None:
    path = Path(file.removeprefix("tests/"))
    assert (TESTS / path).is_file()
    assert not test or test in names_in(str(path))


def test_the_named_cases_exist() -> None:
    sys.path.insert(0, str(TESTS / "gradients"))
    zoo, layers = importlib.import_module("zoo"), importlib.import_module("test_layers")
    cases = re.findall(r"case `([^`]+)`", PAGE)
    assert len(cases) > 50
    assert not [case for case in cases if case not in zoo.CASES and case not in layers.CASES]


def test_every_row_names_a_test_or_a_case() -> None:
    rows = [row for row in ROWS if row[0] not in ("what must hold", "model", "loop")]
    assert len(rows) > 50
    for row in rows:
        assert re.search(r"\.py|case `", row[-1]), row[0]
