"""The Grafana dashboard in docker/ draws metrics that exist."""

import inspect
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from mcmoe_vllm.plugin.metrics import METRICS

pytestmark = pytest.mark.vllm

DASHBOARD = Path(__file__).parents[2] / "docker" / "grafana.json"


def test_every_metric_exists():
    from vllm.v1.metrics import loggers

    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    named = set(re.findall(r"\b(?:mcmoe_|vllm:)\w+", " ".join(queries)))
    assert {name for name in named if name.startswith("mcmoe_")} == {
        f"{name}_total" for name, _ in METRICS
    }
    source = inspect.getsource(loggers)
    others = [name.removesuffix("_total") for name in named if name.startswith("vllm:")]
    assert len(others) == 2 and all(f'name="{name}"' in source for name in others)


def test_panels_do_not_cover_each_other():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 3
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
