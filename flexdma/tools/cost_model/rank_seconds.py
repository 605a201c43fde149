"""The least seconds of one rank's share, by the rates of a data sheet: of the device, in its node and between nodes."""

from dataclasses import dataclass

from flexdma.tools.cost_model.data_sheets import Device, estimate
from flexdma.tools.cost_model.prefix_scan import Rounds, doubling, simulated


@dataclass(frozen=True)
class Links:
    """Links of a device at `achieved` times their rates.  latency: seconds before the first byte of a message arrives."""

    device: Device
    latency: float
    achieved: float = 1.0

    def message(self, source: int, destination: int, size: float) -> float:
        """Seconds of a message between two ranks."""
        device = self.device
        rate = device.link if source // device.node == destination // device.node else device.network
        return self.latency + size / (rate * self.achieved)

    def all_to_all(self, ranks: int, received: float) -> float:
        """Seconds in which a rank receives an equal part of this from each other one, over both links at once."""
        near, others = min(ranks, self.device.node) - 1, max(1, ranks - 1)
        local = received * near / others / self.device.link
        return self.latency + max(local, received * (others - near) / others / self.device.network) / self.achieved


def own_seconds(links: Links, cost: dict[str, float]) -> float:
    """Computing or memory, whichever takes longer."""
    times = estimate(links.device, cost, links.achieved)
    return max(times["computing"], times["memory"])


def scan_seconds(links: Links, ranks: int, size: float, rounds: Rounds | None = None) -> float:
    """Until the last rank has the state of all earlier ones, by doubling or by `rounds`.

    size: bytes of a state.  A join reads two of them and writes one.
    """
    join = 3 * size / (links.device.bandwidth * links.achieved)
    ready = [0.0] * ranks
    return max(
        simulated(doubling(ranks) if rounds is None else rounds, ready, lambda a, b: links.message(a, b, size), join)
    )


def ring_seconds(links: Links, ranks: int, cost: dict[str, float], passes: int) -> float:
    """Blocks arrive while others are computed.  All ranks wait for the slowest link in each of the ranks - 1 steps."""
    if ranks == 1:
        return own_seconds(links, cost)
    rate = links.device.link if ranks <= links.device.node else links.device.network
    arriving = passes * (ranks - 1) * links.latency + cost["received"] / (rate * links.achieved)
    return max(own_seconds(links, cost), arriving)


def ulysses_seconds(links: Links, ranks: int, cost: dict[str, float], passes: int) -> float:
    """Two exchanges in each pass, and attention between them waits for them."""
    parts = 2 * passes
    return own_seconds(links, cost) + parts * links.all_to_all(ranks, cost["received"] / parts)
