"""A model that runs a layer at a time, 16-bit or compressed."""
