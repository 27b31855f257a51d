"""Whatever is damaged, a command ends with its work or a sentence: a few seconds of it on every
push, `make fuzz` for as long as one likes."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from tests.fuzz.cases import FAMILIES, Sound

EXAMPLES = {"compressed": 12, "source": 12, "plan": 6, "text": 6}


@pytest.fixture(scope="module")
def sound(tiny_models, calibration_text, tmp_path_factory):
    return make_sound(tiny_models("mixtral"), calibration_text, tmp_path_factory.mktemp("sound"))


def make_sound(source, text, folder):
    """The first lines of a text, and a model compressed to several widths."""
    short = folder / "text.jsonl"
    short.write_text(text.read_text().splitlines()[0][:30_000].rstrip("\\") + '"}\n')
    compressed = folder / "compressed"
    quantize(
        QuantizeOptions(
            model=str(source),
            output=str(compressed),
            calibration=str(short),
            bits=2.25,
            recipe="paper",
            method="rtn",
            samples=2,
            sequence_length=32,
        )
    )
    return Sound(source, compressed, short)


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_ends_in_a_sentence(sound, family):
    @settings(
        max_examples=EXAMPLES[family],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(number=st.integers(0, 2**32))
    def check(number):
        with tempfile.TemporaryDirectory() as scratch:
            case = FAMILIES[family](sound, Path(scratch), number)
        assert not case.faults, (number, case.damage, case.faults)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_input_is_accepted(sound, family, tmp_path, monkeypatch):
    """Or a harness that refuses everything would pass."""
    monkeypatch.setattr("tests.fuzz.cases.mutate", lambda *_, **__: "")
    monkeypatch.setattr("tests.fuzz.cases.mutate_text", lambda *_, **__: "")
    case = FAMILIES[family](sound, tmp_path, 0)
    assert not case.faults and {o.code for o in case.outcomes.values()} <= {0, None}, case
