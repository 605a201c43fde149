"""The table of all systems that choose keys: what each selects by, what it costs, and the function that makes its mask.

systems.py      one entry for each system
examples.py     the mask of a system for some scores
measure.py      visited blocks over the ideal
tables.py       the table as Markdown, JSON and for a terminal
pictures.py     a picture of each mask
command.py      python -m flexdma policies
"""
