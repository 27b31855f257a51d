"""One matrix to codes, scales and zeros."""
