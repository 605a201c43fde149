"""The cost model: the work of a call, and the rates of devices.

symbols            the sizes in the formulas
pairs              pairs of query and key that a mask shows and that the lowerings compute
packed_blocks      places of packed keys, and the blocks that a sliding window visits, in closed form
calls              FLOPs, bytes and memory of each call, as formulas
sequence_parallel  the same of a sequence divided over ranks, and what a rank receives
prefix_scan        schedules of the scan that gives each rank the state of earlier ones, and their simulation
kernel_bytes       bytes per key, place and tile that the generated kernels move
counts             counts of keys seen and blocks visited under given lifespans
data_sheets        vendors' rates of devices and of the links between them, and the least time that they allow
measured           rates measured on a machine, and the time that they predict
"""
