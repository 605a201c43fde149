"""`python -m flexdma retrofit`: an existing model -> a folder with the same model in bounded memory, and what that costs.

options      the options of the command
texts        the parts of texts: one calibrates, the other is measured
record       what an earlier run left, and whether this one may go on from it
folder       folders that an interruption leaves whole or absent
conversion   calibration and distillation, each -> a folder
measurement  the converted model against full attention and a window
command      the command line
"""
