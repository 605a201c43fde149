"""The tables of a measurement, for a terminal, as Markdown and as HTML."""

import html
from typing import Any, NamedTuple

from flexdma.tools.long_context.measure import NEEDLES, NLL, SPEED
from flexdma.tools.long_context.summary import Summary

MIB = 2**20
NONE = "-"


class Table(NamedTuple):
    """Rows of text, of which the first columns are names, and what the columns mean."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    names: int  # number of columns with names
    meaning: str


def tables(summary: Summary) -> list[Table]:
    """The tables of the sections that have results."""
    made = ((NLL, _nll), (NEEDLES, _needles), (SPEED, _speed))
    return [make(summary) for section, make in made if summary.has(section)]


def _nll(summary: Summary) -> Table:
    texts, ranges = summary.distinct(NLL, "text"), summary.ranges()
    blocks: list[tuple[str, str | None]] = [(text, text) for text in texts]
    if len(texts) > 1:
        blocks.append(("mean of texts", None))
    rows = [
        [title, name, *(_number(summary.nll(name, first, last, text), ".3f") for first, last in ranges),
         _number(summary.gap_closed(name, text), ".2f")]
        for title, text in blocks for name in summary.contenders if summary.nll(name, *ranges[0]) is not None
    ]  # fmt: skip
    *parts, beyond = ranges
    columns = ["text", "attention", *(f"{first:,} to {last - 1:,}" for first, last in parts), f"from {beyond[0]:,} on"]
    return Table(
        "Negative log-likelihood per token by position", [*columns, "gap closed"], rows, 2,
        "In nats, lower is better; columns are positions in the context. Gap closed: of the difference between sinks + "
        "window (0) and full attention (1), from the first position on that a bounded cache cannot keep all of. "
        "What compresses after a prefill has no such pass.",
    )  # fmt: skip


def _needles(summary: Summary) -> Table:
    kinds, seeds = summary.distinct(NEEDLES, "kind"), summary.distinct(NEEDLES, "seed")
    columns = ["attention", "keys", "bounded", *kinds, "all", "nll"]
    rows = []
    for name, contender in summary.contenders.items():
        together = summary.needles(name)
        if together is not None:
            keys = "all" if contender["keys"] is None else f"{contender['keys']:,.4g}"
            each = [_rate(summary.needles(name, kind=kind)) for kind in kinds]
            rows.append([name, keys, contender["bounded"], *each, _rate(together), _number(together.nll, ".2f")])
            if len(seeds) > 1:
                rates = [found.rate for seed in seeds if (found := summary.needles(name, seed=seed)) is not None]
                rows[-1][-2] += f", by seed {min(rates):.2f} to {max(rates):.2f}"
    lengths = ", ".join(f"{length:,}" for length in summary.distinct(NEEDLES, "length"))
    hidden = sorted(summary.distinct(NEEDLES, "depth"))
    return Table(
        f"Needles found in {lengths} tokens, at depths {hidden[0]:.0%} to {hidden[-1]:.0%}", columns, rows, 1,
        "Exact matches, in brackets over those of full attention; nll per digit; keys per KV head, sinks included. "
        "Pass key: five digits in repeated filler; digits: seven in "
        "real text; keys: one of four such facts is asked; values: three facts about one key are asked, each after the "
        "right answers before it. One value is found exactly if greedy decoding writes it. Contenders that are bounded "
        "after prefill read the whole context in full, then keep so many keys, and then read the question.",
    )  # fmt: skip


def _speed(summary: Summary) -> Table:
    rows = []
    for length in summary.distinct(SPEED, "length"):
        for name in summary.contenders:
            size, prefill, decode = (
                summary.speed(name, length, metric) for metric in ("cache_bytes", "prefill_seconds", "decode_seconds")
            )
            if prefill is not None:
                rows.append([
                    f"{length:,}", name, _number(size and size / MIB, ",.2f"), _number(length / prefill, ",.0f"),
                    _number(decode and 1 / decode, ",.1f"), _number(summary.speed(name, length, "decode_over_full"), ".2f"),
                ])  # fmt: skip
    columns = ["context", "attention", "cache, MiB", "prefill, tokens/s", "decoding, tokens/s", "over full"]
    return Table(
        "Memory and speed", columns, rows, 2,
        "The cache after the prefill; medians of runs in turns, of one sequence; decoding after the context.",
    )  # fmt: skip


def _rate(needles: Any) -> str:
    if needles is None:
        return NONE
    return f"{needles.exact}/{needles.cases} ({_number(needles.of_full, '.2f')})"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def as_markdown(table: Table) -> str:
    """A title, the table, and what the columns mean."""

    def line(cells: list[str]) -> str:
        escaped = (cell.replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rules = ["---"] * table.names + ["---:"] * (len(table.columns) - table.names)
    lines = map(line, (table.columns, rules, *table.rows))
    return "\n".join([f"**{table.title}**", "", *lines, "", table.meaning, ""])


def as_html(table: Table) -> str:
    """The table as elements, with all text escaped."""

    def cells(tag: str, row: list[str]) -> str:
        kinds = (' class="name"' if number < table.names else "" for number in range(len(row)))
        return "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for kind, text in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return (
        f'<section>\n<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>\n<thead><tr>{cells("th", table.columns)}'
        f"</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n<p>{html.escape(table.meaning)}</p>\n</section>"
    )


def as_rich(table: Table) -> Any:
    """A table of rich, for a terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), caption_justify="left"
    )
    shown.caption = Text(table.meaning)
    for number, column in enumerate(table.columns):
        is_name = number < table.names
        shown.add_column(Text(column), justify="left" if is_name else "right", no_wrap=is_name)
    for before, row in zip([None, *table.rows], table.rows, strict=False):
        changes = before is not None and table.names > 1 and before[0] != row[0]
        if changes:
            shown.add_section()
        shown.add_row(*map(Text, row))
    return shown
