"""The model card says what was done, by which recipe, and how to serve the folder."""

import re

import pytest

from mcmoe_vllm.checkpoint.sizes import Sizes
from mcmoe_vllm.plan import Plan, same_group_size
from mcmoe_vllm.report.card import write_model_card

BITS = ((0, 1, 2), (3, 4, 2))
W2_BITS = ((0, 3, 2), (4, 1, 2))


def plan_of(bits=BITS, w2_bits=W2_BITS, model="mistralai/Mixtral-8x7B", **options) -> Plan:
    return Plan(
        model=model, architecture="MixtralForCausalLM", layers=(1, 3), bits=bits, w2_bits=w2_bits,
        candidate_bits=(0, 1, 2, 3, 4), group_size=same_group_size(32), dense_bits=4,
        nominal_bits=2.0, options=options,
    )  # fmt: skip


SIZES = Sizes(
    original_bytes=6000, expert_bytes=600, other_bytes=400, expert_parameters=1920, parameters=3000
)

BEST = {"recipe": "best", "allocation": "sensitivity", "solver": "knapsack"}
PAPER = {"recipe": "paper", "allocation": "pmq", "solver": "HiGHS"}


def card(folder, plan=None, licence=None, recipe=BEST, starved=None) -> str:
    result = {
        "mcmoe_version": "0.1.0",
        "recipe": recipe,
        "bytes": {"original": 6000, "compressed": 1000},
        "calibration": {
            "source": "texts/a.jsonl", "samples": 8, "sequence_length": 64, "seed": 3
        },
        "starved_experts": starved or {},
    }  # fmt: skip
    write_model_card(folder, "mixtral-2.5bit", result, plan or plan_of(), SIZES, licence)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("recipe", "said", "unsaid"),
    [
        (BEST, "recipe `best`: gate and up of every expert share a width", "integer program"),
        (BEST, "knapsack over the measured KL divergence", "importance"),
        (PAPER, "recipe `paper`: every expert has a width of its own. An integer program", "KL"),
        ({"recipe": "best", "allocation": "sensitivity"}, "that the plan gave it", "knapsack"),
    ],
)
def test_the_card_says_how_widths_were_chosen(tmp_path, recipe, said, unsaid):
    text = card(tmp_path, recipe=recipe)
    assert said in text and unsaid not in text


def test_the_card_of_one_width(tmp_path):
    text = card(tmp_path, plan=plan_of(((1, 1), (1, 1)), ()), recipe=PAPER)
    assert "`paper`: every matrix has 1 bit." in text and "program" not in text


def test_the_card_serves_the_folder_itself(tmp_path):
    text = card(tmp_path)
    assert "\nvllm serve mixtral-2.5bit --quantization mcmoe\n" in text
    assert "in the folder that holds `mixtral-2.5bit` (or give its path)" in text
    assert "Mixtral-8x7B-mcmoe" not in text


def test_the_card_says_that_transformers_cannot_load_the_folder(tmp_path):
    (line,) = [line for line in card(tmp_path).splitlines() if "from_pretrained" in line]
    assert "cannot load" in line and "vLLM with mcmoe-vllm" in line and "mcmoe eval" in line


def test_the_card_links_the_paper_by_the_papers_name(tmp_path):
    assert re.findall(r"\[([^]]*)\]\(https?:", card(tmp_path)) == ["MC-MoE"]


def test_the_card_counts_whole_matrices(tmp_path):
    rows = re.findall(r"^\| (\d bits?) \| (\d+) \|$", card(tmp_path), re.MULTILINE)
    assert dict(rows) == {"0 bits": "3", "1 bit": "3", "2 bits": "6", "3 bits": "3", "4 bits": "3"}


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("mistralai/Mixtral-8x7B", "mistralai/Mixtral-8x7B"),
        ("/data/Mixtral", None),
        ("./models/Mixtral", None),
        ("../Mixtral", None),
        ("a/b/Mixtral", None),
        ("Mixtral", None),
        ("here/Mixtral", None),  # a folder of that name is there
    ],
)
def test_only_names_of_the_hub_are_base_models(tmp_path, monkeypatch, model, found):
    from huggingface_hub import ModelCard

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "Mixtral").mkdir(parents=True)
    card(tmp_path, plan=plan_of(model=model))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == found and data.library_name == "vllm"
    assert data.license is None


def test_the_licence_is_that_of_the_copied_file(tmp_path):
    from huggingface_hub import ModelCard

    card(tmp_path, licence="LICENSE.txt")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_link) == ("other", "LICENSE.txt")


def test_the_card_names_experts_that_calibration_missed(tmp_path):
    assert "reached every expert. plan.json and report.json" in card(tmp_path)
    text = card(tmp_path, starved={"1": [0, 2], "3": [1]})
    assert "hardly reached: layer 1: 0, 2; layer 3: 1. plan.json" in text
