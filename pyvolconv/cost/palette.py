"""Colours and type of the report's plots, for a light and for a dark page.

The colours of the passes are Okabe and Ito's ("Color universal design", 2008), which every common form of colour
blindness tells apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl

Theme = dict[str, str]

PASS_COLOURS = {
    "forward": "#0072B2",
    "grad_input": "#E69F00",
    "grad_weight": "#009E73",
    "backward": "#CC79A7",
    "everything else": "#9AA0A6",
}
THEMES = {
    "light": {
        "ink": "#1f2328",
        "muted": "#59636e",
        "grid": "#d8dee4",
        "torch": "#B34700",
        "ours": "#0072B2",
        "lstm": "#7A7F85",
    },
    "dark": {
        "ink": "#e6edf3",
        "muted": "#9aa4af",
        "grid": "#3a424c",
        "torch": "#FF9D5C",
        "ours": "#56B4E9",
        "lstm": "#B4BAC2",
    },
}
DPI = 144


def pass_colour(pass_: str) -> str:
    """The colour of a pass; one grey for all that is none of them."""
    return PASS_COLOURS.get(pass_, PASS_COLOURS["everything else"])


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Draw everything inside the block in one theme."""
    ink, muted, grid = theme["ink"], theme["muted"], theme["grid"]
    with mpl.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9.5,
            "text.color": ink,
            "axes.labelcolor": muted,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": grid,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": grid,
            "grid.linewidth": 0.6,
            "xtick.color": muted,
            "ytick.color": ink,
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.frameon": False,
        }
    ):
        yield
