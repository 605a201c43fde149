"""Measures of language models in long contexts.

wordings      the sentences, names and questions of needles
needles       numbers hidden in a context, and the question for them
texts         files of text -> tokens, and stretches of them
plan          the sizes of a measurement, and the tokens for it
passes        negative log-likelihood by position, and of answers, by one forward pass with logits in chunks
contenders    a model with full attention, with sinks and a window, or as it was converted
speed         seconds of prefill and decoding, and bytes of caches
measure       all of it for several contenders -> records
summary       records -> the numbers of tables and pictures
tables, pictures, page    what shows them
options       options of commands that measure
report        a measurement as a command runs it
"""
