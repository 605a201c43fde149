"""Runs blocks of documentation, each in a process of its own, forked from one that has imported torch."""

import atexit
import contextlib
import multiprocessing
import os
import traceback
import warnings
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
# Importing takes longer than most blocks.  Nothing else is imported, as a block may set variables that packages read.
_processes.set_forkserver_preload(["torch", "flexdma"])


def run_block(block: str, folder: Path) -> str | None:
    """Run the code in `folder`.  Returns None, or where it did not end with code 0 what it wrote to standard error."""
    errors = folder / "stderr.txt"
    process = _processes.Process(target=_run, args=(block, str(folder), str(errors)))
    process.start()
    process.join()
    return None if process.exitcode == 0 else errors.read_text()


def _run(block: str, folder: str, errors: str) -> None:
    os.chdir(folder)
    os.environ["HF_MODULES_CACHE"] = os.path.join(folder, "modules")
    warnings.simplefilter("ignore")
    with (
        open(errors, "w") as stderr,
        open(os.devnull, "w") as stdout,
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(stdout),
    ):
        try:
            exec(compile(block, "<block>", "exec"), {"__name__": "__main__"})
            # A forked process does not run these, among them the end of Inductor's workers.
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
            raise
