"""The demonstration: `python -m flexdma demo` trains four small language models, alike but for attention (`byte_models`).

text        bytes to train and to validate on
training    alike for all of them
masks       what the trained gates keep
pictures    drawings of that
report      table, sample, results.json
command     the command line
"""
