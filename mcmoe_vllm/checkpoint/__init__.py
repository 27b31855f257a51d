"""What lies on disk: checkpoints, compressed or not, their manifest and their sizes."""
