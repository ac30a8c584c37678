"""Draws the rooms of the library and who stands on whom, as its files import each other.

python docs/figures/rooms.py
"""

from __future__ import annotations

import ast
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
HOME = HERE.parents[1] / "irw_optim"

ROOMS = {  # centre, and what the room answers
    "criterion": ((1.0, 0.4), "what is the loss\nof each sample?"),
    "gradients": ((6.2, 0.4), "how is the matrix G\nmultiplied?"),
    "weighting": ((3.6, 0.4), "how much does\neach sample count?"),
    "backward": ((3.6, 2.0), "what does a loss\ngive its leaves?"),
    "optimizer": ((3.6, 3.6), "how does a loop get\nthe weighted step?"),
    "distributed": ((6.2, 2.0), "several processes,\nthe step of one"),
    "privacy": ((1.0, 3.6), "weights with a\nprivacy guarantee"),
    "schemes": ((6.2, 3.6), "weights over the\nwhole data set"),
    "monitor": ((6.2, 5.2), "who is weighed,\nover a training"),
}
PLAIN = {"criterion", "gradients", "weighting", "backward", "optimizer"}
WIDTH, HEIGHT = 2.1, 0.95


def imported_by(room: str) -> set[str]:
    """The rooms whose files a room's files import."""
    found: set[str] = set()
    for file in (HOME / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("irw_optim."):
                found.add((node.module or "").split(".")[1])
    return found & ROOMS.keys() - {room}


def main() -> None:
    figure, axes = plt.subplots(figsize=(7.6, 6.2))
    reaches = {room: imported_by(room) for room in ROOMS}
    boxes = {}
    for room, ((x, y), question) in ROOMS.items():
        plain = room in PLAIN
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        style = "round,pad=0.02,rounding_size=0.12"
        colour = "#d7e8f7" if plain else "#f3f3f3"
        boxes[room] = axes.add_patch(
            FancyBboxPatch(
                corner, WIDTH, HEIGHT, boxstyle=style, fc=colour, ec="#456", lw=1.2, zorder=3
            )
        )
        axes.text(x, y + 0.22, f"{room}/", ha="center", va="center", weight="bold", zorder=4)
        axes.text(x, y - 0.17, question, ha="center", va="center", fontsize=8.5, zorder=4)
    for room, (centre, _) in ROOMS.items():
        for other in reaches[room]:
            # What a room reaches by way of another needs no arrow of its own.
            ways = (reaches[room] & PLAIN if room in PLAIN else reaches[room]) - {other}
            if any(other in reaches[way] for way in ways):
                continue
            axes.annotate(
                "",
                xy=ROOMS[other][0],
                xytext=centre,
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": "#456",
                    "linestyle": "--" if room in PLAIN and other not in PLAIN else "-",
                    "patchA": boxes[room],
                    "patchB": boxes[other],
                },
                zorder=5,
            )
    axes.set_xlim(-0.3, 7.5)
    axes.set_ylim(-0.3, 5.9)
    axes.axis("off")
    axes.text(
        -0.2,
        5.6,
        "An arrow: is built on. Blue: the way of a plain step;\n"
        "the others are loaded when used (dashed).",
        fontsize=9,
        va="top",
    )
    figure.savefig(HERE / "rooms.png", dpi=150, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
