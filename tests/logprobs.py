"""How far an engine's log-probabilities are from a reference's."""

import torch


def difference(measured, reference):
    return (torch.as_tensor(measured) - reference).abs()


def assert_equal_numbers(measured, reference):
    """float32 on both sides: what is left is the order of summation."""
    error = difference(measured, reference)
    assert error.mean() <= 2e-3 and (error <= 0.05).float().mean() >= 0.99
