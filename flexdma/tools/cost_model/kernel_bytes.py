"""Bytes that Inductor's kernels for sm_90 move besides queries, keys, values and outputs.

Fitted to Inductor's count of the buffers that kernels read and write.  `python -m tests.tools.fitted_bytes` counts again
and prints both tables.
"""

BYTES = {
    # Lifespans, per key and round: two bits per round below 2^21 keys, one from there on.
    "round of two bits, key": 55,
    "round of one bit, key": 48,
    # Reference gates, packing and block lists, per place and per tile (a row block and a key block of one period): in
    # inference, in the forward of training, and in the backward.
    "inference, place": 155,
    "inference, tile": 90,
    "training, place": 226,
    "training, tile": 102,
    "backward, key": 86,
    "backward, place": 109,
    "backward, tile": 17,
    # Per byte of the state's keys and values, and per key besides.  Inductor counts an overwritten slot as the whole buffer,
    # so up to 4 of the 10 are too many.
    "decode, byte": 10,
    "decode, key": 152,
}

# Peak bytes of packing, and of making the block lists after it, operator by operator, as PyTorch's allocator counts them.
PEAKS = {
    "packing, place": 114,
    "lists, place": 19,
    "inference lists, tile": 48,
    "training lists, tile": 66,
}
