"""The pruning rule by hand, its table, and the switch of a launch."""

import json

import pytest
import torch

from mcmoe_kernels.pruning import drop_mask, prune
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.pruning.table import (
    Pruning,
    PruningTable,
    lone_tokens,
    parse_switch,
    read_table,
    switch_of,
)

TABLE = PruningTable("sensitivity", 0.2, (0, 3), {0.1: (0.25, 0.125), 0.2: (0.5, 0.375)})


def test_an_expert_below_the_ratio_is_dropped_in_any_order():
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    ids = torch.tensor([[4, 1], [1, 4], [0, 2]], dtype=torch.int32)
    assert drop_mask(weights, ids, 0.5).tolist() == [[0, 1], [1, 0], [0, 0]]
    # 0.25 / 0.75 itself is not below the ratio.
    assert not drop_mask(weights, ids, 0.25 / 0.75).any()
    kept, pruned = prune(weights, ids, 0.5)
    assert pruned.tolist() == [[4, -1], [-1, 4], [0, 2]] and pruned.dtype == ids.dtype
    assert torch.equal(kept, weights) and ids.min() >= 0


def test_renormalizing_keeps_the_sum_of_the_row():
    weights = torch.tensor([[0.5, 0.25, 0.0625], [0.1, 0.1, 0.1]])
    ids = torch.arange(6).view(2, 3)
    kept, pruned = prune(weights, ids, 0.4, renormalize=True)
    assert pruned.tolist() == [[0, 1, -1], [3, 4, 5]]
    torch.testing.assert_close((kept * (pruned >= 0)).sum(1), weights.sum(1))


def test_skipped_pairs_are_nobodys_largest():
    weights = torch.tensor([[float("nan"), 0.1, 0.3], [9.0, 0.2, 0.3]])
    ids = torch.tensor([[-1, 1, 2], [-1, 1, 2]])
    assert prune(weights, ids, 0.5)[1].tolist() == [[-1, -1, 2], [-1, 1, 2]]
    empty = torch.full((2, 3), -1)
    assert torch.equal(prune(weights, empty, 0.5)[1], empty)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_largest_always_stays_and_a_row_decides_alone(top_k):
    torch.manual_seed(top_k)
    weights, ids = torch.rand(64, top_k).softmax(1), torch.rand(64, 16).topk(top_k)[1]
    mask = drop_mask(weights, ids, 1.0)
    assert not mask.gather(1, weights.argmax(1, keepdim=True)).any()
    assert mask.sum() == 64 * (top_k - 1)
    mask = drop_mask(weights, ids, 0.6)
    alone = [drop_mask(weights[i : i + 1], ids[i : i + 1], 0.6) for i in range(64)]
    assert torch.equal(mask, torch.cat(alone))


@pytest.mark.parametrize(
    ("query_starts", "tokens", "alone"),
    [
        ([0, 1, 2, 3], 3, [1, 1, 1]),
        ([0, 3, 4, 4, 6, 7], 9, [0, 0, 0, 1, 0, 0, 1, 0, 0]),  # one without tokens, then padding
        ([0], 2, [0, 0]),  # no request at all
    ],
)
def test_a_token_is_alone_if_its_request_brings_no_other(query_starts, tokens, alone):
    starts = torch.tensor(query_starts, dtype=torch.int32)
    assert lone_tokens(starts, tokens).tolist() == alone


def test_what_was_dropped_is_counted():
    pruning = Pruning({1: 0.5})
    weights, ids = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 1], [-1, 1]])
    assert torch.equal(pruning(0, weights, ids)[1], ids)  # a layer without a ratio
    pruning(1, weights, ids)
    assert (pruning.routed, pruning.dropped) == (6, 1)
    assert pruning.dropped_fraction == pytest.approx(1 / 6)


def test_ratios_between_two_shares_are_interpolated():
    assert TABLE.layer_ratios() == {0: 0.5, 3: 0.375}
    assert TABLE.layer_ratios(0.0) == {0: 0.0, 3: 0.0}
    assert TABLE.layer_ratios(0.05) == {0: 0.125, 3: 0.0625}
    assert TABLE.layer_ratios(0.15) == pytest.approx({0: 0.375, 3: 0.25})
    with pytest.raises(UserError, match="calibrated are 0 to 0.2"):
        TABLE.layer_ratios(0.25)


def test_the_table_survives_json():
    value = json.loads(json.dumps(TABLE.to_dict()))
    assert PruningTable.from_dict(value) == TABLE
    with pytest.raises(UserError, match="Calibrate again"):
        PruningTable.from_dict({**value, "more": 1})


def test_a_broken_table_is_refused_all_at_once():
    with pytest.raises(UserError) as e:
        PruningTable("best", 0.7, (0, 1), {0.6: (0.1,), 0.2: (1.5, 0.0)})
    for part in ("'best'", "0.7", "0.6", "1 layers", "1.5", "not ascending"):
        assert part in str(e.value)


def test_a_table_for_other_layers_is_refused():
    def quantization(*layers):
        return QuantizationConfig(
            group_size={"w13": 128, "w2": 128, "dense": 128},
            expert_bits=dict.fromkeys(layers, ("23", "23")),
            pruning=TABLE,
        )

    assert read_table(quantization(0, 3)) == TABLE and read_table(None) is None
    with pytest.raises(UserError, match=r"disagree on layers \[3, 4\]"):
        quantization(0, 4)


def test_the_switch_of_a_launch():
    on = TABLE.layer_ratios()
    assert parse_switch(None, None) == {} and parse_switch(None, TABLE) == on
    assert parse_switch("off", TABLE) == {} and parse_switch("on", TABLE) == on
    assert parse_switch(0.1, TABLE) == {0: 0.25, 3: 0.125}
    assert parse_switch("decode-only", TABLE) == on
    for setting in ("maybe", True, [0.1]):
        with pytest.raises(UserError, match="allowed are"):
            parse_switch(setting, TABLE)
    for setting in ("on", "decode-only", 0.1):
        with pytest.raises(UserError, match="calibrate-pruning"):
            parse_switch(setting, None)


def test_the_switch_in_the_additional_config():
    assert switch_of({}) is None and switch_of(None) is None
    assert switch_of({"mcmoe": {"pruning": "off"}, "other": 1}) == "off"
    for wrong in ("off", {"prune": "off"}):
        with pytest.raises(UserError, match="only key"):
            switch_of({"mcmoe": wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"renormalize": "no"}, "renormalize is 'no', needs true or false"),
        ({"renormalize": 0}, "renormalize is 0, needs"),
        ({"rule": ["median"]}, "rule is .'median'., needs a string"),
        ({"target_drop": "0.1"}, "target_drop is '0.1', needs a number"),
        ({"target_drop": True}, "target_drop is True, needs a number"),
        ({"target_drop": 10**400}, "target_drop is 1000.*, needs a number"),
        ({"layers": [0, 0]}, r"layers repeats \[0\]"),
        ({"layers": [0.0, 3]}, "layers is .*, needs a list of the numbers"),
        ({"layers": [True, 3]}, "needs a list of the numbers"),
        ({"layers": [-1, 3]}, "needs a list of the numbers"),
        ({"layers": {"0": 1, "3": 2}}, "needs a list of the numbers"),
        ({"ratios": {"0.2": [0.1, "0.2"]}}, "ratios of '0.2' is .*, needs a list of numbers"),
        ({"ratios": {"0.2": [0.1, float("nan")]}}, "needs a list of numbers"),
        ({"ratios": {"0.2": "00"}}, "needs a list of numbers"),
        ({"ratios": {"0.2": [0.1, 0.1], "2e-1": [0.3, 0.3]}}, "one share as '0.2' and as '2e-1'"),
        ({"ratios": {"0_2": [0.1, 0.1]}}, "the key '0_2', needs a share"),
        ({"ratios": {" 0.2": [0.1, 0.1]}}, "needs a share"),
        ({"ratios": {"nan": [0.1, 0.1]}}, "needs a share"),
        ({"ratios": {"1e999": [0.1, 0.1]}}, "has the share inf, allowed are 0 to 0.5"),
        ({"ratios": [[0.2, [0.1, 0.1]]]}, "ratios is .*, needs an object"),
    ],
)
def test_nothing_in_a_table_is_converted(changes, message):
    """By every reader: what quantization_config says, its table says too."""
    value = {**json.loads(json.dumps(TABLE.to_dict())), **changes}
    settings = QuantizationConfig(
        group_size={"w13": 128, "w2": 128, "dense": 128}, expert_bits={0: ("2", "2")}
    ).to_dict()
    with pytest.raises(UserError, match=message) as refusal:
        QuantizationConfig.from_dict({**settings, "pruning": value})
    assert "UserError" not in str(refusal.value) and len(str(refusal.value)) < 1000


def test_all_that_a_table_lacks_is_named():
    with pytest.raises(UserError) as refusal:
        PruningTable.from_dict({"rule": 5, "layers": None, "colour": "red"})
    for part in (
        "target_drop is missing",
        "ratios is missing",
        "'colour'",
        "rule is 5",
        "layers is",
    ):
        assert part in str(refusal.value)
    for value in ([], "none", 0):
        with pytest.raises(UserError, match="needs an object"):
            PruningTable.from_dict(value)
