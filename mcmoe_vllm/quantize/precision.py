"""How exact products of float32 matrices are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def fast_products(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` multiply float32 matrices on a GPU's tensor cores (TF32: 10 bits of fraction,
    sums in float32), five times as fast.

    For sums over tokens and for corrections of rounding errors, both of which are known to fewer
    bits than that; factorizations stay in full float32. Without a tensor on a GPU among the
    arguments nothing changes.
    """

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        if not any(isinstance(a, torch.Tensor) and a.is_cuda for a in arguments):
            return function(*arguments, **options)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return function(*arguments, **options)
        finally:
            torch.set_float32_matmul_precision(before)

    return run
