"""The cases of each suite, the most important first, because a suite stops when its budget of seconds is used up."""

from collections.abc import Iterator
from dataclasses import dataclass

from flexdma.tools.bench.decoding import Decoder
from flexdma.tools.shapes import Shape

SECTIONS = ("calls", "gate_gradient", "lengths", "others", "launches", "windows")


@dataclass(frozen=True)
class Suite:
    """The cases and setting of a suite.  device: None = CUDA where there is one, else the CPU, with the dtype of DTYPES."""

    device: str | None
    dtype: str | None
    budget: float  # seconds
    calls: tuple[Shape, ...] = ()  # whole calls by all contenders
    gate_gradient: tuple[Shape, ...] = ()  # its share of the backward, by route
    lengths: tuple[Shape, ...] = ()  # time, and the share of the selection, against N
    stages: tuple[tuple[str, Shape], ...] = ()  # (lowering, shape): time by stage
    others: tuple[Shape, ...] = ()  # more whole calls, less important, with the slow contenders
    launches: tuple[Shape, ...] = ()  # kernel launches, with and without CUDA graphs
    windows: tuple[Shape, ...] = ()  # time against w
    decoding: tuple[tuple[str, Decoder], ...] = ()  # (section, decoder): one token against contexts, and prefill
    masks: bool = False  # the families of masks, in the sizes of the device
    packing: tuple[int, int] = (32768, 1024)  # N, w of visited blocks over the families

    def shapes(self) -> Iterator[Shape]:
        """The shapes of all sections."""
        for name in SECTIONS:
            yield from getattr(self, name)
        yield from (shape for _, shape in self.stages)


def _gpu(length: int, window: int, backward: bool, **beside: bool) -> Shape:
    return Shape(length, window, backward, 16, 4, 128, **beside)


# The longest context is a case of its own, because filling its caches takes longest.
CONTEXTS, LONGEST = (256, 512, 1024, 4096, 16384), 65536
FORWARD, TRAINING = _gpu(32768, 1024, False, flex=True), _gpu(131072, 1024, True)
# Times faster than causal SDPA.
CPU_TARGETS = {
    Shape(16384, 1024, False, every=True): 4.5,
    Shape(32768, 1024, False): 9.0,
    Shape(4096, 256, True, every=True): 4.0,
    Shape(8192, 512, True): 5.0,
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SUITES = {
    "cpu": Suite(
        device="cpu",
        dtype="float32",
        budget=440,
        calls=tuple(CPU_TARGETS),
        stages=(
            ("gather", Shape(16384, 1024, False)),
            ("flex", Shape(16384, 1024, False)),
            ("gather", Shape(8192, 512, True)),
        ),
        lengths=tuple(Shape(n, 1024, False) for n in (4096, 8192, 16384, 32768, 131072, 1048576)),
        windows=tuple(Shape(8192, w, False) for w in (128, 256, 512, 1024, 2048)),
    ),
    "gpu": Suite(
        device="cuda",
        dtype="bfloat16",
        budget=440,  # the rest of eight minutes starts and ends processes
        # The cases of the targets come first; most of the time is compilation.
        calls=(FORWARD, TRAINING),
        gate_gradient=(_gpu(32768, 1024, True),),
        lengths=tuple(_gpu(n, 1024, False) for n in (4096, 32768, 262144, 1048576)),
        stages=(("flex", _gpu(32768, 1024, True)),),
        others=(_gpu(32768, 1024, False, every=True), _gpu(8192, 1024, True, every=True)),
        launches=(_gpu(32768, 1024, False),),
        windows=tuple(_gpu(32768, w, False) for w in (256, 1024, 4096)),
    ),
    "decode": Suite(
        device="cpu",
        dtype="float32",
        budget=480,
        decoding=(
            ("decode models", Decoder(1, CONTEXTS)),
            ("decode models", Decoder(1, (1024, 4096, 16384), calibrated=True)),
            *(("decode layers", Decoder(batch, CONTEXTS)) for batch in (1, 8)),
            ("prefill", Decoder(1, (256, 1024, 4096))),
            ("decode models", Decoder(8, CONTEXTS)),
            *(("decode layers", Decoder(batch, CONTEXTS, compiled=True)) for batch in (1, 8)),
            ("decode models", Decoder(1, CONTEXTS, compiled=True)),
            ("decode models", Decoder(1, (LONGEST,))),
            *(("decode layers", Decoder(batch, (LONGEST,))) for batch in (1, 8)),
            ("decode models", Decoder(8, CONTEXTS, compiled=True)),
            ("decode models", Decoder(8, (LONGEST,))),
        ),
    ),
    "masks": Suite(device=None, dtype=None, budget=560, masks=True),
    "quick": Suite(
        device="cpu",
        dtype="float32",
        budget=120,
        calls=(Shape(4096, 256, False), Shape(2048, 128, True)),
        stages=(("gather", Shape(4096, 256, False)), ("gather", Shape(2048, 128, True))),
        packing=(8192, 256),
    ),
}
