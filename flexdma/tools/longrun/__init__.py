"""python -m flexdma longrun: measure a long context.

A layer reads tokens in chunks and passes one `DynamicMaskState` on (arXiv 2508.02124).  Then it decodes from the final
state and, in turns, from an early one.

measure.py    prefill and decoding, with measurements
report.py     the table and the picture
command.py    the command line
"""
