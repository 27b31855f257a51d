"""The experts of a layer on a GPU: one schedule a file, and what they share."""
