"""Progress over the four models: what is running, its loss and speed, and how much of the whole is done."""

from types import TracebackType

from rich.console import Console

from flexdma.tools.demo.training import Course
from flexdma.tools.progress import progress_bars


class TrainingProgress:
    """A context with one line per model and one for all steps; where there is no terminal, one plain line per model."""

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
        """The next model; until its first step is done its bar pulses, for compiling has no measure."""
        note = "compiling, some 10 to 60 s" if self.compiled else "first step"
        self.task = self.bars.add_task(label, total=None, note=note)

    def step(self, course: Course) -> None:
        """After every step of that model."""
        note = f"{course.losses[-1]:.3f} bits/byte, {course.tokens_per_second:,.0f} tokens/s"
        self.bars.update(self.task, total=self.steps, completed=len(course.losses), note=note)
        self.bars.advance(self.total)

    def end(self, label: str, course: Course, bits_per_byte: float) -> None:
        """That model is trained and validated."""
        note = f"{bits_per_byte:.3f} bits/byte on validation text"
        self.bars.update(self.task, note=note)
        if not self.console.is_terminal:
            self.console.print(
                f"{label}: first step {course.compile_seconds:.1f} s, {len(course.losses)} steps in "
                f"{course.seconds:.1f} s, {course.tokens_per_second:,.0f} tokens/s, {note}",
                soft_wrap=True,
            )
