"""Measure FlexAttention's sizes on this machine, and keep the fastest for later calls of the flex lowering.

candidates.py    the sizes to measure
measure.py       the search
store.py         the file of winners; `flexdma.lowerings.tuned` reads it
"""
