"""Record the events of calls in torch: compiled frames, graph breaks, limits, FlexAttention that runs uncompiled.

The events come from Dynamo's compilation metrics and its list of graph breaks, which are the same in torch 2.11 to 2.14.
Only the recompile limit is read from a log message, because it leaves no other trace.
"""

import importlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import utils
from torch._subclasses.fake_tensor import FakeTensor

# Imported by name, because in its package the operator of the same name hides the module.
flex_operator = importlib.import_module("torch._higher_order_ops.flex_attention")
METRICS = 4096  # frames remembered per call; torch's own limit is 64
TORCH, TOOLS = Path(torch.__file__).parent, Path(__file__).parent.parent


@dataclass(frozen=True)
class Recompiled:
    """A frame that was compiled again."""

    frame: str  # torch's number of the function
    where: str
    guard: str  # the guard that failed


@dataclass
class Seen:
    """The events of all calls."""

    graphs: int = 0
    breaks: list[tuple[str, str]] = field(default_factory=list)  # reason, where
    skipped: list[tuple[str, str]] = field(default_factory=list)  # reason, where: functions not compiled at all
    recompiled: list[Recompiled] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    eager_attention: list[str] = field(default_factory=list)  # where
    within_graph: bool = False  # while an uncompiled graph of the doctor's eager backend runs

    def collect(self) -> None:
        """Take over torch's records since the last `collect`."""
        for metrics in utils.get_compilation_metrics():
            self._take(metrics)
        utils.clear_compilation_metrics()
        for reason in utils.graph_break_reasons:
            self.breaks.append((reason.reason, place(reason.user_stack)))
        utils.graph_break_reasons.clear()

    def _take(self, metrics: Any) -> None:
        if metrics.co_name is None:  # a backward, or a frame given up at the recompile limit
            return
        where = f"{metrics.co_filename}:{metrics.co_firstlineno} in {metrics.co_name}"
        if metrics.fail_type is not None:
            line = f"{metrics.fail_user_frame_filename}:{metrics.fail_user_frame_lineno}"
            self.skipped.append((metrics.fail_reason or metrics.fail_type, f"{line} in {metrics.co_name}"))
            return
        self.graphs += bool(metrics.graph_op_count)
        if metrics.recompile_reason is not None:
            frame, _, _ = str(metrics.compile_id).rpartition("/")
            self.recompiled.append(Recompiled(frame, where, metrics.recompile_reason))


@contextmanager
def watching() -> Iterator[Seen]:
    """Record the events of calls made inside.  Clears the compiled code of this process before and after."""
    seen = Seen()
    torch._dynamo.reset()
    utils.set_compilation_metrics_limit(METRICS)
    utils.clear_compilation_metrics()
    logger = logging.getLogger("torch._dynamo.convert_frame")
    original = flex_operator.math_attention

    def warned(record: logging.LogRecord) -> bool:
        if "torch._dynamo hit config." not in str(record.msg):
            return True
        seen.limits.append(record.getMessage())
        return False  # the report has it, so do not log it

    logger.addFilter(warned)
    flex_operator.math_attention = _noting(original, seen)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # The report has each place; torch warns once.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            yield seen
    finally:
        flex_operator.math_attention = original  # type: ignore[attr-defined]
        logger.removeFilter(warned)
        utils.set_compilation_metrics_limit(utils.DEFAULT_COMPILATION_METRICS_LIMIT)
        torch._dynamo.reset()


def _noting(original: Callable, seen: Seen) -> Callable:
    """FlexAttention's uncompiled definition, which records its calls on real tensors."""

    def math_attention(query: torch.Tensor, *rest: Any) -> Any:
        if not isinstance(query, FakeTensor) and not seen.within_graph:
            where = place(traceback.extract_stack())
            if where not in seen.eager_attention:
                seen.eager_attention.append(where)
        return original(query, *rest)

    return math_attention


def place(stack: list[traceback.FrameSummary]) -> str:
    """The innermost line outside of torch and of these tools."""
    frames = [f for f in stack if not f.filename.startswith("<") and not _inside(f.filename)] or list(stack)
    if not frames:
        return "unknown"
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")


def _inside(filename: str) -> bool:
    parents = Path(filename).parents
    return TORCH in parents or TOOLS in parents
