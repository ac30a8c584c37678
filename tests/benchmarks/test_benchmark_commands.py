"""The commands that the pages name are there, and take what they are given."""

import re
import shlex
from importlib import import_module

import pytest

from benchmarks import report
from benchmarks.report import ROOT

PAGES = [ROOT / "README.md", ROOT / "Makefile", ROOT / "benchmarks" / "README.md"]
COMMAND = re.compile(r"python -m (benchmarks\.\w+ \w+[^`#\n]*)")
COMMANDS = sorted(
    {
        found.strip()
        for page in [*PAGES, *(ROOT / "docs").glob("*.md")]
        for found in COMMAND.findall(page.read_text(encoding="utf-8"))
    }
)


class ReadError(Exception):
    """The arguments were read, and no work is to be done."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_named_command_understands_its_arguments(command, monkeypatch):
    package, name, *given = shlex.split(command)
    read, entry = report.options, report.entry(import_module(f"{package}.{name}"))

    def options(*arguments, **more):
        read(*arguments, **more)
        raise ReadError

    monkeypatch.setattr(report, "options", options)
    for other in ("evidence.report", "schemes.figures"):  # take no arguments
        if f"benchmarks.{other}" == f"{package}.{name}":
            assert not given
            return
    with pytest.raises(ReadError):
        entry(given)


def test_the_pages_name_every_package():
    assert {command.split()[0] for command in COMMANDS} >= {
        "benchmarks.cost",
        "benchmarks.evidence",
        "benchmarks.schemes",
    }
