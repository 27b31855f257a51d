"""The report of families: what it prints, and what it says of a step that failed."""

import pytest

from tests.families import matrix


def test_a_row_for_each_family_and_the_reasons_below():
    read = {"read": {"ok": True, "error": 1e-7}}
    served = {"serve": {"ok": False, "error": 0.5, "control": 0.6, "pruned": 0.15}}
    text = matrix.table(
        {"a": {**read, **served}, "b": {"read": {"ok": False, "why": "UserError: no"}}}
    )
    head, a, b, _, bounds, reason = text.splitlines()
    assert head.split()[:3] == ["family", "read", "compress"]
    assert a.split() == ["a", "1e-07", *"-----", "-", "0.5", "(!)", "0.6", "15.0%"]
    assert b.split()[:2] == ["b", "failed"] and reason == "b read: UserError: no"
    assert "2e-03" in bounds


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("x\n(pid) ERROR [f.py:1] ValueError: 1\nTypeError: 2\n more", "TypeError: 2  more"),
        ("ModuleNotFoundError: No t\nValueError: see above", "ModuleNotFoundError: No t"),
        ("killed", "killed"),
        ('OSError: in "/home/me/x-1/a.py" of a/b', 'OSError: in "a.py" of a/b'),
    ],
)
def test_the_last_error_is_told(log, said):
    assert matrix.last_error(log) == said


def test_a_step_without_what_it_needs_is_left_out(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        matrix, "run_step", lambda step, *_: ran.append(step) or {"ok": step != "compress"}
    )
    results = {"read": {"ok": True}}
    matrix.run_family("mixtral", results, list(matrix.STEPS), tmp_path)
    assert ran == ["compress", "plain"] and list(results) == ["read", *ran]
