"""Scores of tasks: what is read out of the harness's results, and what is refused."""

import pytest

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate import tasks
from mcmoe_vllm.evaluate.task_index import open_task_index
from mcmoe_vllm.evaluate.tasks import evaluate_tasks, join_scores

FOUND = {
    "results": {
        "arc": {
            "alias": "arc",
            "acc,none": 0.45,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.0},
        "wikitext": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
    },
    "higher_is_better": {
        "arc": {"acc": True, "acc_norm": True},
        "gsm8k": {"exact_match": True},
        "wikitext": {"word_perplexity": False},
    },
    "n-samples": {"arc": {"original": 1172, "effective": 100}, "gsm8k": {}, "wikitext": {}},
}
BASE = {
    "results": {
        "arc": {"acc,none": 0.5, "acc_stderr,none": 0.02, "acc_norm,none": 0.4},
        "gsm8k": {"exact_match,strict-match": 0.0},
        "wikitext": {"word_perplexity,none": 10.0},
    }
}


def test_scores_are_joined_with_the_bases():
    scores = {(s.task, s.metric): s for s in join_scores(FOUND, BASE)}
    assert list(scores) == [
        ("arc", "acc"),
        ("arc", "acc_norm"),
        ("gsm8k", "exact_match (strict-match)"),
        ("wikitext", "word_perplexity"),
    ]
    acc = scores["arc", "acc"]
    assert (acc.score, acc.stderr, acc.samples) == (0.45, 0.01, 100)
    assert (acc.base_score, acc.base_stderr) == (0.5, 0.02)
    assert acc.recovery == pytest.approx(0.9)
    assert scores["arc", "acc_norm"].recovery == pytest.approx(1.25)
    assert scores["arc", "acc_norm"].stderr is None


def test_no_recovery_where_less_is_better_or_the_base_scores_nothing():
    scores = {s.task: s for s in join_scores(FOUND, BASE)}
    assert scores["wikitext"].base_score == 10.0
    assert scores["wikitext"].recovery is None and scores["gsm8k"].recovery is None
    assert all(s.base_score is None and s.recovery is None for s in join_scores(FOUND, None))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vllm and lm_eval.*mcmoe-vllm\[tasks\]"):
        evaluate_tasks("model", ["arc_easy"])


@pytest.mark.nightly
def test_unknown_tasks_are_all_named_with_near_ones(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(tasks, "find_spec", lambda name: True)
    with pytest.raises(UserError) as error:
        evaluate_tasks("model", ["arc_easi", "arc_easy", "no_such_thing_at_all"])
    assert "arc_easi (near: arc_easy" in str(error.value)
    assert "no_such_thing_at_all" in str(error.value)


OWN = """
task: mine
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: x
doc_to_choice: [a, b]
doc_to_target: 0
"""


def test_tasks_of_ones_own_do_without_the_harness_s(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval.tasks")
    (tmp_path / "mine.yaml").write_text(OWN)
    (tmp_path / "group.yaml").write_text("group: ours\ntask: [mine, arc_easy]\n")
    made, real = [], lm_eval.TaskManager

    def manager(include_path, include_defaults=True):
        made.append(include_defaults)
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval, "TaskManager", manager)
    assert open_task_index(["mine"], str(tmp_path)).match_tasks(["mine"]) == ["mine"]
    assert made == [False]
    for names, folder in ((["ours"], tmp_path), (["mine", "arc_easy"], tmp_path), (["mine"], None)):
        made.clear()
        open_task_index(names, None if folder is None else str(folder))
        assert made[-1] is True, names


def test_include_path_must_be_a_folder(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(tasks, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        evaluate_tasks("model", ["mine"], include_path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": 0}, "limit is 0, needs"),
        ({"limit": float("nan")}, "limit is nan, needs a finite"),
        ({"num_fewshot": -1}, "num_fewshot is -1, needs at least 0"),
        ({"tasks": []}, "tasks is .., needs a list"),
        ({"tasks": "arc"}, "tasks is 'arc', needs a list"),
    ],
)
def test_numbers_are_checked_before_the_engine_starts(given, message):
    with pytest.raises(UserError, match=message):
        evaluate_tasks("model", **{"tasks": ["arc_easy"], **given})


def test_scores_that_are_not_finite_are_an_error():
    broken = {**FOUND, "results": {**FOUND["results"], "ppl": {"loss,none": float("nan")}}}
    with pytest.raises(UserError, match="the scores of ppl loss are not finite"):
        join_scores(broken, None)
    base = {"results": {"arc": {"acc,none": float("inf"), "acc_norm,none": "N/A"}}}
    with pytest.raises(UserError, match="the scores of arc acc are not finite"):
        join_scores(FOUND, base)
    results = {"arc": {"acc,none": 0.5, "acc_stderr,none": float("nan")}}
    assert join_scores({**FOUND, "results": results}, None)[0].stderr is None
