"""Measures one entry in a process of its own, and prints what it found as one line of JSON.

python -m benchmarks.zoo.one "BERT" --seconds 3
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from typing import Any

import torch

from benchmarks.zoo.exactness import errors
from benchmarks.zoo.measuring import cost
from benchmarks.zoo.registry import named


class Heard(logging.Handler):
    """Keeps what the library has to say, each text once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()[:200]
        if text not in self.texts:
            self.texts.append(text)


def main() -> None:
    """Measure one entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--size", type=int, help="B, where it is not the entry's")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the pairs of steps")
    parser.add_argument("--no-exact", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    heard = Heard()
    logging.getLogger("irw_optim").addHandler(heard)
    entry = named(options.name)
    size = options.size or entry.size
    found: dict[str, Any] = {"name": entry.name, "family": entry.family}
    try:
        found |= cost(entry, size, options.seconds)
        if heard.texts:
            found["said"] = list(heard.texts)
        if not options.no_exact:
            found |= errors(entry, size)
    except Exception as error:
        found["fails"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
