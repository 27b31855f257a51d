"""The Grafana dashboard in docker/ draws metrics that exist."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from mcmoe_vllm.plugin.metrics import METRICS

pytestmark = pytest.mark.vllm

DASHBOARD = Path(__file__).parents[2] / "docker" / "grafana.json"


def vllm_metrics(vllm_config):
    """The names that a server of this vLLM shows."""
    from vllm.v1.metrics import loggers, prometheus

    vllm_config.model_config = SimpleNamespace(
        served_model_name="a-model", max_model_len=256, is_diffusion=False
    )
    logger = loggers.PrometheusStatLogger(vllm_config)
    try:
        registry = prometheus.get_prometheus_registry()
        return {sample.name for metric in registry.collect() for sample in metric.samples}
    finally:
        prometheus.unregister_vllm_metrics()
        del logger


def test_every_metric_exists(vllm_config):
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    named = set(re.findall(r"\b(?:mcmoe_|vllm:)\w+", " ".join(queries)))
    assert {name for name in named if name.startswith("mcmoe_")} == {
        f"{name}_total" for name, _ in METRICS
    }
    others = {name for name in named if name.startswith("vllm:")}
    assert len(others) == 2 and others <= vllm_metrics(vllm_config)


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
