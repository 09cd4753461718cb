"""Figures as files. Imported where one is drawn: Matplotlib takes a third of a second."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG

from common.atomic_file import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def save_svg(figure: Figure, path: Path) -> None:
    """Save a figure as SVG; without a date and random ids the same results give the same bytes. Raises OSError."""
    FigureCanvasSVG(figure)
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_atomically(path, buffer.getvalue())
