"""python -m flexdma experiments: mixers trained side by side on tasks that separate them.

tasks/        what is learned: batches of symbols and targets
mixers/       the attentions, by name, with one interface
model.py      blocks of a mixer and an MLP, the same for all mixers
keys_seen.py  how many keys queries see
training.py   one run: a mixer, a task, a learning rate and a seed
grid.py       all runs of an experiment, each kept in a file, so that an interrupted experiment goes on
presets.py    sizes for two CPU cores, for a GPU, and the paper's
report.py     tables and pictures of the runs
command.py    the options
"""
