"""The job, in order: measure, choose, quantize, finetune, publish."""
