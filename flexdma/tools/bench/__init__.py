"""The benchmark: `python -m flexdma bench`.  It times all contenders in one run, with mask building inside the timer."""
