"""What a model is worth: perplexity, divergence, scores on tasks."""
