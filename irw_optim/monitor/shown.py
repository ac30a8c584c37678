"""A figure that a notebook shows, whether or not it ever asked matplotlib for that."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """Without pyplot, nobody has told the notebook how to show a `matplotlib.figure.Figure`."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
