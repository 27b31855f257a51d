"""The shipped tables parse, fit every shape, and answer with the nearest that was measured."""

import json
import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from mcmoe_kernels.gpu import choice
from mcmoe_kernels.gpu.choice import (
    CONFIGS,
    SIZES,
    LayerShape,
    PrefillConfig,
    SingleConfig,
    WarpConfig,
    choose_config,
    compiler,
    configs_for,
    dump_config,
    fit,
    largest_share,
    parse_config,
    read_table,
)

MIXTRAL = LayerShape(8, 2, 4096, 14336)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.json")))
def test_shipped_tables(name):
    table = read_table(name)
    assert MIXTRAL in table
    for shape, configs in table.items():
        assert min(configs) == 1 and max(configs) >= 4096
        for config in configs.values():
            assert parse_config(dump_config(config)) == config
            assert (2 * shape.intermediate_size) % config.block_n13 == 0
            assert shape.hidden_size % config.block_n2 == 0


def test_another_shape_takes_the_nearest_and_says_so(caplog):
    configs_for.cache_clear()
    other = LayerShape(8, 2, 4096, 14336 // 2 + 32)
    with caplog.at_level(logging.INFO, logger="mcmoe_kernels"):
        configs = configs_for("default", other)
    assert "4096" in caplog.text and "default" in caplog.text
    for tokens, config in configs.items():  # rows of 2 * 7200: blocks of 64 alone divide them
        assert config.block_n13 == (192 if tokens == 1 else 64)


@pytest.mark.parametrize(
    ("shape", "experts"),
    [
        ((64, 6, 2048, 1408), 128),
        ((16, 2, 2048, 7168), 8),  # three factors of two; by plain differences it is the other
        ((8, 2, 1024, 1024), 8),
    ],
)
def test_the_nearest_shape_by_factors(shape, experts):
    of = {s.num_experts: configs_for("default", s) for s in read_table("default")}
    assert of.keys() == {8, 128} and of[8] != of[128]
    shape = LayerShape(*shape)
    expected = {tokens: fit(config, shape) for tokens, config in of[experts].items()}
    assert configs_for("default", shape) == expected


def test_the_nearest_number_of_tokens_by_factor():
    one, many = choose_config(CPU, MIXTRAL, 1), choose_config(CPU, MIXTRAL, 10**6)
    assert isinstance(one, SingleConfig) and isinstance(many, PrefillConfig)
    assert not isinstance(choose_config(CPU, MIXTRAL, 2), SingleConfig)
    listed = configs_for("default", MIXTRAL)
    assert choose_config(CPU, MIXTRAL, 7) == listed[8]


def test_experts_without_a_gate_have_half_the_rows():
    shape = LayerShape(128, 6, 2688, 1856, rows=1)
    for tokens, config in configs_for("default", shape).items():
        assert 1856 % config.block_n13 == 0 and 2688 % config.block_n2 == 0, tokens


def test_smaller_groups_than_were_measured_take_more_registers(tmp_path, monkeypatch):
    configs = {1: WarpConfig(stages13=8, registers13=80), 64: PrefillConfig(registers=128)}
    tokens = {str(n): dump_config(config) for n, config in configs.items()}
    sizes = dict(zip(SIZES, (8, 2, 4096, 14336), strict=True))
    monkeypatch.setattr(choice, "CONFIGS", tmp_path)
    for name, given in (("of-128", {}), ("of-64", {"group_size": 64})):
        table = {"triton": compiler(), "shapes": [{**sizes, **given, "tokens": tokens}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    shape = replace(MIXTRAL, group_size=64)
    assert configs_for("of-128", MIXTRAL) == configs_for("of-64", shape) == configs
    assert configs_for("of-128", shape) == {
        1: WarpConfig(stages13=4, stages2=1),
        64: PrefillConfig(registers=255),
    }


@pytest.mark.parametrize("version", ["0.1", compiler()])
def test_limits_on_registers_are_of_the_compiler_that_they_were_measured_with(
    version, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(choice, "CONFIGS", tmp_path)
    few, many = WarpConfig(registers13=80, registers2=96), PrefillConfig(registers=128)
    tokens = {"2": dump_config(few), "256": dump_config(many)}
    table = {"triton": version, "shapes": [{**MIXTRAL.__dict__, "tokens": tokens}]}
    (tmp_path / f"measured-{version}.json").write_text(json.dumps(table))
    with caplog.at_level(logging.INFO, logger="mcmoe_kernels"):
        configs = read_table(f"measured-{version}")[MIXTRAL]
    assert configs == {2: few if version == compiler() else WarpConfig(), 256: many}
    assert ("0.1" in caplog.text) == (version == "0.1")


def test_a_broken_table_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "CONFIGS", tmp_path)
    (tmp_path / "broken.json").write_text('{"shapes": [{"num_experts": 8}]}')
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_table("broken")


@pytest.mark.parametrize(
    ("rows", "at_most", "warps", "share"),
    [
        (28672, 448, 32, 448),  # 28 of 32 warps have 16 rows
        (1536, 448, 32, 384),
        (1536, 256, 8, 256),  # 32 rows a warp
        (1408, 224, 8, 128),  # 176 rows are no multiple of the 32 a warp would have
        (64, 16, 4, 16),
    ],
)
def test_shares_of_rows(rows, at_most, warps, share):
    assert largest_share(rows, at_most, warps) == share


def test_a_warp_keeps_at_least_16_rows():
    """Rows are cut to what divides them, and warps with them, in either product."""
    fitted = fit(WarpConfig(4, 256, 128, 16, 8, 1, 2, 2), LayerShape(8, 2, 64, 32))
    assert (fitted.block_n13, fitted.block_n2) == (64, 64)
    assert fitted.warps13 == 64 // 16 * fitted.parts13 < 16
    assert fitted.warps2 == 64 // 16 * fitted.parts2 < 8
