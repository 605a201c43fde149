"""Progress over the four models: the running model with its loss and speed, and the share of all steps done."""

from types import TracebackType

from rich.console import Console

from flexdma.tools.demo.training import Course
from flexdma.tools.progress import progress_bars


class TrainingProgress:
    """A context with one bar per model and one for all steps; without a terminal, one plain line per model."""

    def __init__(self, console: Console, *, models: int, steps: int, compiled: bool) -> None:
        self.console, self.steps, self.compiled = console, steps, compiled
        self.bars = progress_bars(console, disable=not console.is_terminal)
        self.total = self.bars.add_task("all models", total=models * steps, note="")

    def __enter__(self) -> "TrainingProgress":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bars.stop()

    def begin(self, label: str) -> None:
        """Begin the next model.  Its bar pulses during the first step, because compilation reports no progress."""
        note = "compiling, about 10 to 60 s" if self.compiled else "first step"
        self.task = self.bars.add_task(label, total=None, note=note)

    def step(self, course: Course) -> None:
        """Show a finished step of that model."""
        note = f"{course.losses[-1]:.3f} bits/byte, {course.tokens_per_second:,.0f} tokens/s"
        self.bars.update(self.task, total=self.steps, completed=len(course.losses), note=note)
        self.bars.advance(self.total)

    def end(self, label: str, course: Course, bits_per_byte: float) -> None:
        """Show that the model is trained and validated."""
        note = f"{bits_per_byte:.3f} bits/byte on validation text"
        self.bars.update(self.task, note=note)
        if not self.console.is_terminal:
            self.console.print(
                f"{label}: first step {course.compile_seconds:.1f} s, {len(course.losses)} steps in "
                f"{course.seconds:.1f} s, {course.tokens_per_second:,.0f} tokens/s, {note}",
                soft_wrap=True,
            )
