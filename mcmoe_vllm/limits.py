"""What may be chosen, where a format, the options and their checks have to agree. Imports nothing,
so that the command line can state it at once."""

CANDIDATE_BITS = (0, 1, 2, 3, 4)  # 0: the expert is dropped
GROUP_SIZES = (32, 64, 128)
# Kinds of matrices with a group size each: gate and up, down, int4 linears.
PROJECTION_GROUPS = ("w13", "w2", "dense")
MAX_RANKS = 1024  # of tensor parallelism
DENSE_BITS = (4, 16)
MAX_DROP = 0.5  # share of expert activations that online pruning may drop
MAX_WINDOWS = 1 << 20  # of a text
MAX_SEED = 2**64 - 1  # of torch
MAX_EXPONENT = 10  # of PMQ's costs; beyond it they overflow
DEFAULT_DATASET = "allenai/c4"  # of the Hub, to calibrate on
