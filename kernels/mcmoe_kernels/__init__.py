"""Bit layouts and kernels for experts of 1 to 4 bits; needs torch (and triton on a GPU) alone."""
