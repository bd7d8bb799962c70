"""The alerts and the dashboard in deploy/monitoring speak of metrics and labels that there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostler.inference.v1 import inference_pb2 as inference
from hostler.placement.v1 import placement_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import Meter
from gateway.state_metrics import StateCollector
from tests.deploy import tools

from .tree import ROOT

FOLDER = ROOT / "deploy" / "monitoring"
_NAME = re.compile(r"\b(?:hostler|gen_ai)_[a-z_]+[a-z]\b(?!\s*[,)=!~])")
_IN_BRACES = re.compile(r"\{[^}]*\}")
_BY = re.compile(r"\bby \([^)]*\)")


def metrics_that_there_are() -> set[str]:
    """Return the name of every sample that a server with one of everything tells."""
    meter = Meter()
    meter.reply("GET", 200)
    with meter.request("chat", "m") as seen:
        usage = inference.Usage(
            num_prompt_tokens=1, num_cached_tokens=1, num_completion_tokens=2, num_reasoning_tokens=1
        )
        timing = inference.Timing(queue_us=1, prefill_us=1)
        seen.take(inference.GenerateResponse(text=inference.TextDelta(text="x")))
        seen.take(inference.GenerateResponse(finish=inference.Finish(usage=usage, timing=timing)))
    status = pb.GetStatusResponse(
        devices=[pb.Device(id="cuda:0")],
        models=[pb.ModelRoute(name="m", state=pb.MODEL_STATE_FAILED)],
        replicas=[pb.ReplicaStatus(model="m", parts=[pb.DeviceBytes(device="cuda:0", num_bytes=1)])],
        nodes=[pb.Node()],
        event_counts=[pb.EventCount(kind=pb.EVENT_KIND_READY, model="m", count=1)],
    )
    families = text_string_to_metric_families(meter.text(StateCollector(status)).decode())
    return {sample.name for family in families for sample in family.samples}


def expressions() -> list[str]:
    dashboard: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
    alerts = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def named_in(expression: str) -> set[str]:
    return set(_NAME.findall(_BY.sub("", _IN_BRACES.sub("", expression))))


def test_every_metric_that_is_asked_for_is_told() -> None:
    named = set().union(*map(named_in, expressions()))
    assert len(named) > 10
    assert named <= metrics_that_there_are()


def test_a_metric_that_there_is_not_would_be_found() -> None:
    assert named_in('sum by (model) (rate(hostler_gone_total{kind="x"}[5m])) / hostler_device_budget_bytes') == {
        "hostler_gone_total",
        "hostler_device_budget_bytes",
    }


def test_every_panel_has_a_place_of_its_own() -> None:
    panels = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_prometheus_own_checker_takes_them(command: tuple[str, str]) -> None:
    done = subprocess.run(
        [tools.find("promtool"), "check", *command],
        cwd=Path(FOLDER),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
