"""What is made of experiments: tables, pictures and a page.

columns.py       what the table of each kind of task has
tables.py        the table in a terminal, and as Markdown
curves.py        the score over training
heat_maps.py     needles by length and depth
scaling.py       bits per byte over parameters
gate_courses.py  gates over training
claims.py        the paper's claims, each with the mixers and the numbers that test it
page.py          docs/results.md
"""
