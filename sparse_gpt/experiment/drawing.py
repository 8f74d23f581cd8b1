"""How every plot looks: two themes, one style an arm, text that is only text; to SVG and PNG."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's colours, told apart by colour-blind readers; black is the theme's text colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1")
MARKERS = "osD^vPXh"
LINES = ("-", "--", ":", "-.")
SEEDS = 0.65  # opacity of the small marks of single seeds
LONGEST = 40  # letters of a label in a plot

# The dark plot is the light one with these exchanged: no arm may have one of them.
LIGHT = {"text": "#1f2328", "grid": "#d0d7de", "back": "#fffffe"}
DARK = {"text": "#e6edf3", "grid": "#3d444d", "back": "#0d1117"}


@dataclass(frozen=True)
class Style:
    """Line and marker of an arm; the same in every plot of a page."""

    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class Plot:
    """`draw()` makes the figure under the theme; `text` says what it shows."""

    name: str
    title: str
    text: str
    draw: Callable[[], Figure]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each arm by its place: the first (the baseline) in the text's colour."""
    found = {}
    for place, name in enumerate(dict.fromkeys(names)):
        colour = "text" if place == 0 else COLOURS[(place - 1) % len(COLOURS)]
        turn = 0 if place == 0 else (place - 1) // len(COLOURS)
        found[name] = Style(colour, MARKERS[place % len(MARKERS)], LINES[turn % len(LINES)])
    return found


def colour(style: Style) -> str:
    """The colour under the theme."""
    return matplotlib.rcParams["text.color"] if style.colour == "text" else style.colour


def label(text: str, longest: int = LONGEST) -> str:
    """A record's text as text: no mathematics, no hidden legend entry, not too long."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return (" " + short if short.startswith("_") else short).replace("$", r"\$")


def figure(width: float = 9.0, height: float = 4.5) -> Figure:
    """A figure without the global state of pyplot."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


@dataclass(frozen=True)
class Drawn:
    """A plot as bytes: SVG without a background for both themes, and the light one as PNG."""

    plot: Plot
    light: str
    dark: str
    png: bytes


def drawn(plot: Plot) -> Drawn:
    """Draw a plot once; the same bytes for the same data."""
    vector, raster = io.StringIO(), io.BytesIO()
    with _themed(LIGHT):
        made = plot.draw()
        made.draw_without_rendering()
        made.set_layout_engine("none")  # laid out once for both files
        made.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        made.savefig(raster, format="png", dpi=110, metadata={"Software": None})
    light = vector.getvalue()
    dark = light
    for role, tone in LIGHT.items():
        dark = dark.replace(tone, DARK[role])
    return Drawn(plot, light, dark, raster.getvalue())


@contextmanager
def _themed(theme: dict[str, str]) -> Iterator[None]:
    settings: dict[RcKeyType, Any] = {
        "text.color": theme["text"],
        "axes.labelcolor": theme["text"],
        "axes.edgecolor": theme["grid"],
        "axes.facecolor": theme["back"],
        "figure.facecolor": theme["back"],
        "xtick.color": theme["text"],
        "ytick.color": theme["text"],
        "grid.color": theme["grid"],
        "legend.frameon": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "font.family": ["DejaVu Sans", "sans-serif"],
        "svg.fonttype": "none",  # text stays text: small files, searchable
        "svg.hashsalt": "sparse_gpt",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes in the PNG; a browser has other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
