"""Online pruning: the table of a checkpoint, and how it is calibrated."""
