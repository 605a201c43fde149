"""Session-wide settings: one Inductor cache for all tests, two threads, hypothesis without deadlines."""

import gc
import os
import tempfile
from pathlib import Path

# Set before torch is imported.  Later tests, and the next run, reuse the kernels that one test compiles.
_cache = Path(__file__).parent.parent / ".inductor-cache"
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(_cache if os.access(_cache.parent, os.W_OK) else tempfile.gettempdir())
)
# Threads that wait do not take a core from the other workers' tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor's pool of processes is no faster where each core runs tests, and imports torch in each of them.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# No test depends on sizes that `python -m flexdma tune` has kept on this machine.
os.environ["FLEXDMA_TUNED"] = ""

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tools.view_cases import make_checkpoint, make_text

settings.register_profile(
    "flexdma", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("flexdma")


def pytest_collection_modifyitems(items):
    """Skip tests that need a GPU, the network or minutes, unless `-m gpu`, `-m slow` or `-m network` selects them."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for marker in ("slow", "network"):
            if item.get_closest_marker(marker) and marker not in item.config.getoption("markexpr"):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: run with -m {marker}"))


def pytest_collection_finish():
    """Collect garbage among new objects alone, and less often: it took a quarter of the time of tests that compile."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_unconfigure():
    """Let the interpreter end as usual: Triton complains about what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
    yield
    # So that no test hits the recompile limit because of another.
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint as the demo writes it, of small untrained models."""
    return make_checkpoint(tmp_path_factory.mktemp("report") / "checkpoint")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text for `view` with this checkpoint."""
    return make_text(tmp_path / "text.txt")
