"""python -m flexdma experiments: mixers trained side by side on tasks that separate them.

tasks/        what is learned: batches of symbols and targets
probes/       what is measured of a model besides its answers
reports/      tables, pictures and docs/results.md
mixers/       the attentions, by name, with one interface
gate_variants.py  variants of DMA's gate, as mixers
model.py      blocks of a mixer and an MLP, the same for all mixers
keys_seen.py  how many keys queries see
training.py   one run: a mixer, a task, a learning rate and a seed
grid.py       all runs of an experiment, each kept in a file, so that an interrupted experiment goes on
presets.py    sizes for two CPU cores, for a GPU, and the paper's
experiment.py an experiment that was run, as one JSON
command.py    the options
"""
