"""Byte-level language models: the demo trains and saves them, view shows the keys that they keep, experiments compares them.

attentions    four kinds of attention
model         the language model around them
checkpoint    trained models as files
text          training and validation text, as bytes
labels        one readable label for each byte
"""
