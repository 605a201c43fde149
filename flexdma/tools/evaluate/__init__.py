"""`python -m flexdma evaluate`: full attention, sinks and a window, converted models and kvpress side by side at equal keys.

options      the options of the command
models       the named models -> contenders
presses      NVIDIA kvpress's compression after the prefill, as contenders
join         results of several runs -> those of one
resume       the results that a run goes on from
command      the command line
"""
