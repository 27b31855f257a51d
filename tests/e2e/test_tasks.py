"""`mcmoe eval --tasks` scores a compressed model and its base on a task of the user's own."""

import json
import random

import pytest

from mcmoe_vllm.cli import main
from mcmoe_vllm.model.text import load_tokenizer, strided_windows
from tests.conftest import EXAMPLE_MODEL

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.nightly,
]

DOCUMENTS = 40
TASK = """
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_recovery_on_a_task_of_ones_own(compressed_example, evaluation_text, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    tokenizer = load_tokenizer(EXAMPLE_MODEL)
    windows = strided_windows(str(evaluation_text), tokenizer, DOCUMENTS, 48)
    texts = [(tokenizer.decode(w[:32]), tokenizer.decode(w[32:])) for w in windows]
    rng = random.Random(0)
    with (tmp_path / "documents.jsonl").open("w") as f:
        for context, right in texts:
            choices = [right, *(end for _, end in rng.sample(texts, 3))]
            order = rng.sample(range(4), 4)
            document = {
                "context": context,
                "choices": [choices[i] for i in order],
                "label": order.index(0),
            }
            f.write(json.dumps(document) + "\n")
    (tmp_path / "continuation.yaml").write_text(TASK.format(file=tmp_path / "documents.jsonl"))
    code = main(
        [
            *("eval", str(compressed_example), "--against", str(EXAMPLE_MODEL)),
            *("--tasks", "continuation", "--include-path", str(tmp_path), "--limit", "32"),
            *("--engine-args", '{"enforce_eager": true, "max_num_seqs": 8}'),
            *("--json", str(tmp_path / "scores.json")),
        ]
    )
    assert code == 0
    assert "recovery" in capsys.readouterr().out
    (score,) = json.loads((tmp_path / "scores.json").read_text())
    assert (score["task"], score["metric"], score["samples"]) == ("continuation", "acc", 32)
    # The right one of four continuations: both models must beat guessing by far.
    assert score["score"] > 0.5 and score["base_score"] > 0.5
    assert score["recovery"] == pytest.approx(score["score"] / score["base_score"])
