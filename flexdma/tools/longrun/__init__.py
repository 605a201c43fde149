"""python -m flexdma longrun: endless context, measured.

A layer reads as many tokens as asked, chunk by chunk, and hands one `DynamicMaskState` on (arXiv 2508.02124); then it
decodes, from the state that they left and, in turns, from the one that the first few thousand left.

measure.py    the work           chunks in, measurements out
report.py     what it leaves     the table, JSON, the picture
command.py    the command line
"""
