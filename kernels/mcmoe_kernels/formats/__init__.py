"""Bytes to numbers: what a width's codes look like in a file, in a tile and in a register."""
