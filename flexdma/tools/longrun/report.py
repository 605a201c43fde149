"""The results of a long run as a table and a picture."""

from pathlib import Path
from typing import Any

from flexdma.atomic_write import atomic_write
from flexdma.tools.longrun.measure import MEMORY_FROM, Measurements

MIB = 2**20


def table(measured: Measurements) -> str:
    """Markdown: one row per doubling of the context, then memory and decoding times."""
    lines = ["| tokens read | seconds | tokens/s | peak memory, MiB |", "|---|---|---|---|"]
    shown = 0
    for number, (tokens, seconds, peak) in enumerate(measured.marks):
        if tokens >= 2 * shown or number == len(measured.marks) - 1:
            lines.append(f"| {tokens:,} | {seconds:.1f} | {tokens / seconds:,.0f} | {peak / MIB:,.0f} |")
            shown = tokens
    lines.append("")
    if measured.growth is not None:
        more = measured.marks[-1][2] * (1 - 1 / measured.growth) / MIB
        lines.append(f"Peak memory at the end / at {MEMORY_FROM:,} tokens: {measured.growth:.3f} ({more:+.1f} MiB)")
    lines.append(
        f"State: {measured.state_bytes / MIB:.2f} MiB; a full cache would hold {measured.full_cache_bytes / MIB:,.0f} MiB"
    )
    for context, seconds in measured.decode_seconds.items():
        lines.append(f"Decoding after {context} tokens: {1e3 * seconds:.3f} ms per token (median)")
    if len(measured.decode_seconds) == 2:
        early, late = measured.decode_seconds.values()
        lines.append(f"Second / first: {late / early:.3f}")
    return "\n".join(lines)


def write_plot(path: Path, measured: Measurements) -> None:
    """Tokens per second and peak memory against the tokens read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    tokens: list[Any] = [0, *(mark[0] for mark in measured.marks)]
    clock = [0.0, *(mark[1] for mark in measured.marks)]
    rates = [(tokens[n + 1] - tokens[n]) / (clock[n + 1] - clock[n]) for n in range(len(measured.marks))]
    speed.plot(tokens[1:], rates, color="#0072B2")
    speed.set_ylabel("tokens per second, each chunk")
    memory.plot(tokens[1:], [mark[2] / MIB for mark in measured.marks], color="#D55E00")
    memory.set_ylabel("peak memory so far, MiB")
    for axes in (speed, memory):
        axes.set_xlabel("tokens read")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.suptitle("Speed and memory over a long context")
    atomic_write(path, lambda part: figure.savefig(part))
