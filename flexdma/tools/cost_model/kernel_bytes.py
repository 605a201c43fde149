"""Bytes that Inductor's kernels for sm_90 move besides queries, keys, values and outputs.

Fitted to Inductor's count of the buffers that kernels read and write.  `python -m tests.tools.fitted_bytes` counts again
and prints both tables.
"""

BYTES = {
    # Lifespans, per key and round: two bits per round below 2^21 keys, one from there on.
    "round of two bits, key": 45,
    "round of one bit, key": 45,
    # Reference gates, packing and block lists, per place and per tile (a row block and a key block of one period): in
    # inference, in the forward of training, and in the backward.
    "inference, place": 165,
    "inference, tile": 48,
    "training, place": 204,
    "training, tile": 80,
    "backward, key": 260,
    "backward, place": 28,
    "backward, tile": 9,
    # Per byte of the state's keys and values, and per key besides.  Inductor counts an overwritten slot as the whole buffer,
    # so up to 4 of the 10 are too many.
    "decode, byte": 10,
    "decode, key": 160,
}

# Peak bytes of packing, and of making the block lists after it, operator by operator, as PyTorch's allocator counts them.
PEAKS = {
    "packing, place": 114,
    "lists, place": 19,
    "inference lists, tile": 48,
    "training lists, tile": 66,
}
