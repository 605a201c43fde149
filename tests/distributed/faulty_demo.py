"""python -m tests.distributed.faulty_demo FAULT ...: the demo, in which rank 1 dies, hangs or is stopped after two steps."""

import os
import signal
import sys
import time
from unittest import mock

from flexdma.__main__ import main
from flexdma.tools.demo.progress import TrainingProgress
from flexdma.tools.demo.training import Course

FAULTS = {
    "dies": lambda: os._exit(7),
    "hangs": lambda: time.sleep(1000),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def run(fault: str, arguments: list[str]) -> int:
    """The demo's exit code on this rank."""
    shown = TrainingProgress.step

    def step(progress: TrainingProgress, course: Course) -> None:
        shown(progress, course)
        if len(course.losses) == 2 and os.environ["RANK"] == "1":
            FAULTS[fault]()

    with mock.patch.object(TrainingProgress, "step", step):
        return main(["demo", *arguments])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
