"""All entries. A new file of models is added here; a new model to the file of its family."""

from benchmarks.zoo import (
    graphs,
    hugging_face,
    language,
    series,
    tabular,
    vision_attention,
    vision_mobile,
    vision_residual,
)
from benchmarks.zoo.entry import Entry

_FAMILIES = (vision_residual, vision_mobile, vision_attention, language, series, graphs, tabular)
_FAMILIES += (hugging_face,)
ENTRIES: list[Entry] = [entry for family in _FAMILIES for entry in family.ENTRIES]

GROWING = ("ViT, class token", "BEiT, bias tables", "LSTM", "MobileNetV3, hard-swish")
"""Entries whose ratio is taken at several batch sizes."""


def named(name: str) -> Entry:
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise KeyError(f"no entry {name!r}: `python -m benchmarks.zoo --list` shows the names")
