"""The experts of a layer on a CPU."""
