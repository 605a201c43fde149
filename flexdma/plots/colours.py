"""Colours for colour-blind readers too (Okabe and Ito's), and line styles made of them."""

SERIES = ("#E69F00", "#0072B2", "#444444", "#009E73", "#CC79A7", "#D55E00")
TILES = ("#F2F2F2", "#56B4E9", "#0B3C6F")  # skipped, partial, full
DARK_TILES = ("#21262D", "#2F6F9F", "#9BD3FF")  # for a dark page
KEPT, EVICTED, NEVER = "#0072B2", "#BBBBBB", "#E4E4E4"
QUERY = "#D55E00"
LINE_STYLES = ("-", "--", ":", "-.")


def series_style(index: int) -> dict[str, str]:
    """Colour and line style of the index-th series.  The first 24 series differ."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": LINE_STYLES[index // len(SERIES) % len(LINE_STYLES)]}
