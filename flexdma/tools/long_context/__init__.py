"""Measures of language models in long contexts.

wordings      the sentences, names and questions of needles
needles       numbers hidden in a context, and the question for them
passes        negative log-likelihood by position, and of answers, by one forward pass with logits in chunks
"""
