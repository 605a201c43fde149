"""Peak rates of devices from their vendors' data sheets, and the least time of a call at these rates."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates.  flops: dense bfloat16 multiplications and additions per second; bandwidths in bytes per second."""

    name: str
    flops: float
    bandwidth: float  # of its own memory
    memory: float  # bytes
    link: float  # from other devices of its node, one direction
    source: str
    network: float = 50e9  # from devices of other nodes, one direction
    node: int = 8  # devices that `link` joins


TERA, GIGA = 1e12, 1e9
# Vendors give NVLink's bandwidth for both directions together and, for Hopper and Blackwell, FLOPs with sparsity.  Both are
# halved here.  The network is that of the vendor's DGX, one InfiniBand port per device: 200 Gb/s for A100, 400 for others.
DEVICES = {
    "a100": Device(
        "NVIDIA A100 SXM 80 GB",
        312 * TERA,
        2.039 * TERA,
        80 * GIGA,
        300 * GIGA,
        "NVIDIA A100 datasheet (2021)",
        network=25 * GIGA,
    ),
    "h100": Device("NVIDIA H100 SXM", 989.5 * TERA, 3.35 * TERA, 80 * GIGA, 450 * GIGA, "NVIDIA H100 datasheet (2024)"),
    "h200": Device("NVIDIA H200 SXM", 989.5 * TERA, 4.8 * TERA, 141 * GIGA, 450 * GIGA, "NVIDIA H200 datasheet (2024)"),
    "b200": Device(
        "NVIDIA B200 (of a DGX B200)", 2250 * TERA, 8 * TERA, 180 * GIGA, 900 * GIGA, "NVIDIA DGX B200 datasheet (2024)"
    ),
}


def estimate(device: Device, cost: Mapping[str, float], achieved: float = 1.0) -> dict[str, float]:
    """Seconds {"computing", "memory", "link", "least"} at `achieved` times the device's peak rates; `cost` from `Cost.at`.

    "least" is the longer of computing and memory, which may overlap, plus the link, because queries wait for it.
    """
    computing = cost["flops"] / (device.flops * achieved)
    memory = cost["bytes"] / (device.bandwidth * achieved)
    link = cost["received"] / (device.link * achieved)
    return {"computing": computing, "memory": memory, "link": link, "least": max(computing, memory) + link}
