"""One attention layer in training over several lengths and numbers of devices: DMA, ring attention and Ulysses, as tables."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from flexdma.tools.cost_model.calls import Cost, evaluated
from flexdma.tools.cost_model.prefix_scan import chain, doubling, received_messages
from flexdma.tools.cost_model.rank_seconds import Links, own_seconds, ring_seconds, scan_seconds, ulysses_seconds
from flexdma.tools.cost_model.sequence_parallel import (
    context_parallel,
    held,
    message,
    returned_message,
    ring_attention,
    ulysses,
)

PASSES = 2  # forward and backward
UNITS = {
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
}

WAYS = ("dma", "ring", "ulysses")
COLUMNS = (
    ("Least time", "seconds", "seconds"),
    ("Memory of a device", "bytes", "memory"),
    ("Received by a device", "bytes", "received"),
)


class Division(NamedTuple):
    """One way to divide a sequence over ranks: what a rank needs."""

    seconds: float
    memory: float  # bytes, with query, key, value, output and their gradients
    received: float  # bytes


class Case(NamedTuple):
    """The ways at one size; Ulysses is None where there are more ranks than query heads."""

    tokens: int
    ranks: int
    dma: Division
    ring: Division
    ulysses: Division | None


class Scan(NamedTuple):
    """The prefix scan of the forward at one number of ranks."""

    ranks: int
    rounds: int
    messages: int  # that a rank receives at most
    received: float  # bytes, at most
    seconds: float
    chain_rounds: int
    chain_seconds: float


def compared(links: Links, sizes: dict[str, float], tokens: list[int], ranks: list[int]) -> Iterator[Case]:
    """A case per length and number of ranks; sizes: of `Cost.at`, without N and ranks."""
    inputs, states = held(training=True), (message(), returned_message())
    for length in tokens:
        for count in ranks:
            at = sizes | {"N": length, "ranks": count}
            dma, ring, exchanged = (call.at(**at) for call in _calls())
            own, scan = evaluated(inputs, at), sum(scan_seconds(links, count, evaluated(state, at)) for state in states)
            yield Case(
                length,
                count,
                Division(own_seconds(links, dma) + scan, own + dma["peak"], dma["received"]),
                Division(ring_seconds(links, count, ring, PASSES), own + ring["peak"], ring["received"]),
                Division(
                    ulysses_seconds(links, count, exchanged, PASSES), own + exchanged["peak"], exchanged["received"]
                )
                if count <= sizes["Hq"]
                else None,
            )


def scans(links: Links, sizes: dict[str, float], ranks: list[int]) -> Iterator[Scan]:
    """The scan at each number of ranks, by doubling and by a chain."""
    size = evaluated(message(), sizes)
    for count in ranks:
        rounds, sequential = doubling(count), chain(count)
        messages = max(received_messages(rounds, count))
        yield Scan(
            count, len(rounds), messages, messages * size, scan_seconds(links, count, size, rounds),
            len(sequential), scan_seconds(links, count, size, sequential),
        )  # fmt: skip


@cache
def _calls() -> list[Cost]:
    """The formulas, which take a second to make."""
    return [call(training=True) for call in (context_parallel, ring_attention, ulysses)]


def markdown(cases: list[Case], scan: list[Scan], links: Links, sizes: dict[str, float]) -> str:
    """The tables."""
    device = links.device
    lines = [
        f"{device.name}, {links.achieved:.0%} of the rates of its data sheet: {device.flops / 1e12:,.0f} TFLOP/s, memory "
        f"{device.memory / 1e9:,.0f} GB at {device.bandwidth / 1e12:,.1f} TB/s, {device.link / 1e9:,.0f} GB/s between the "
        f"{device.node} devices of a node, {device.network / 1e9:,.0f} GB/s between nodes; {_of('seconds', links.latency)} "
        f"per message. One layer, B = {sizes['B']}, Hq = {sizes['Hq']}, Hkv = {sizes['Hkv']}, D = {sizes['D']}, "
        f"w = {sizes['w']:,}, {sizes['element']} bytes per number; forward and backward.",
    ]
    for title, unit, field in COLUMNS:
        lines += ["", f"| {title}: tokens | devices | DMA | ring attention | Ulysses | ring / DMA |"]
        lines += ["|---:|---:|---:|---:|---:|---:|"]
        for case in cases:
            dma, ring = getattr(case.dma, field), getattr(case.ring, field)
            ways = [dma, ring, *([] if case.ulysses is None else [getattr(case.ulysses, field)])]
            bound = device.memory if field == "memory" else float("inf")
            cells = [_cell(unit, way, bound) for way in ways] + ["none"] * (3 - len(ways))
            lines += [f"| {case.tokens:,} | {case.ranks:,} | {' | '.join(cells)} | {_ratio(ring, dma)} |"]
    lines += ["", "| Prefix scan: devices | rounds | messages to a device | bytes | time | as a chain: rounds | time |"]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {each.ranks:,} | {each.rounds} | {each.messages} | {_of('bytes', each.received)} | "
        f"{_of('seconds', each.seconds)} | {each.chain_rounds:,} | {_of('seconds', each.chain_seconds)} |"
        for each in scan
    ]
    return "\n".join(lines) + "\n"


def _ratio(over: float, under: float) -> str:
    """A quotient; 1 for one device, which receives nothing in any way."""
    ratio = over / under if under else 1.0
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}"


def _cell(unit: str, value: float, bound: float) -> str:
    """The value, bold where it is above the bound."""
    return f"**{_of(unit, value)}**" if value > bound else _of(unit, value)


def _of(unit: str, value: float) -> str:
    """Three digits, in the largest unit that the value reaches."""
    scale, name = next((each for each in UNITS[unit] if value >= each[0]), UNITS[unit][-1])
    digits = max(0, 3 - len(str(int(value / scale))))
    return f"{value / scale:,.{digits}f} {name}"
