"""`python docs/pictures.py [FOLDER]` draws the pictures of README.md and packing.md, light and dark (default: here)."""

import sys
from pathlib import Path

import matplotlib

from flexdma import causal_top_w
from flexdma.plots import block_figure
from flexdma.plots.colours import DARK_TILES, TILES
from flexdma.tools.gate_families import gate_families

KEYS, WINDOW, BLOCK = 8192, 512, 64
FAMILIES = {"packing": "iid", "packing-heavy-hitters": "heavy hitters"}
# The background is transparent: the page shows through.
THEMES = {"light": ("#1F2328", TILES), "dark": ("#E6EDF3", DARK_TILES)}
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def main(folder: Path) -> list[Path]:
    """Write the pictures and return their paths."""
    gates = gate_families(KEYS)
    paths = []
    for name, family in FAMILIES.items():
        lifespans = causal_top_w(gates[family][None, None], WINDOW)
        title = f"{KEYS:,} keys ({family} gates), each query sees the {WINDOW} best-gated before it"
        for theme, (ink, tiles) in THEMES.items():
            with matplotlib.rc_context(dict.fromkeys(INKED, ink)):
                figure = block_figure(lifespans, window_size=WINDOW, block_size=BLOCK, title=title, colours=tiles)
                paths.append(folder / f"{name}-{theme}.png")
                figure.savefig(paths[-1], dpi=90, transparent=True)
    return paths


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
