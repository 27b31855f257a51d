"""How much memory a CPU engine may spend."""

import pytest

pytest.importorskip("vllm")

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.prepared import DEFAULT_CACHE_GIB, GIB, CacheBudget

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("value", [-1, "four", float("nan"), float("inf"), True])
def test_a_wrong_cache_size_is_refused(value):
    with pytest.raises(UserError, match="cpu_weight_cache_gib is .*, needs a number of GiB from 0"):
        CacheBudget.from_additional_config({"cpu_weight_cache_gib": value})


def test_a_budget_is_spent_to_the_last_byte():
    assert CacheBudget.from_additional_config({}).bytes == DEFAULT_CACHE_GIB * GIB
    assert CacheBudget.from_additional_config(None).bytes == DEFAULT_CACHE_GIB * GIB
    assert CacheBudget.from_additional_config({"cpu_weight_cache_gib": 0}).bytes == 0
    budget = CacheBudget(1)
    assert budget.take(GIB - 3) and not budget.take(4) and budget.bytes == 3
    assert budget.take(3) and budget.bytes == 0
