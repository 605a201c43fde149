"""The demonstration: `python -m flexdma demo` trains four small language models that differ in attention (`byte_models`).

text        bytes for training and validation
training    training and validation, the same for all models
masks       the keys that trained gates keep
pictures    pictures of masks, gates and losses
sampling    text from a trained model
report      the table and results.json
comparison  the whole run
ranks       the processes of torchrun: meshes, and the part of a batch of each
divided_model   a model divided over them
resumable   checkpoints that all of them write
divided     the whole run over several processes
command     the command line
"""
