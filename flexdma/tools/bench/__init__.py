"""The benchmark: `python -m flexdma bench`.  Everything side by side in one run, mask building inside the timer."""
