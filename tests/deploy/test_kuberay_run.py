"""The commands and the configuration of the Kubernetes manifest, run: two pods are two addresses of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.journeys.cluster import Cluster
from tests.journeys.server import Servers, free_port, wait_until
from tests.journeys.test_nodes import ask, devices, ready, status

from .test_kuberay import DOCUMENTS, GPU, RAY, SERVER

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

HEAD_IP, GPU_IP = "127.0.0.2", "127.0.0.3"
GPU_POD = "hostler-gpu-worker-abcde"


class Pods(Cluster):
    """The cluster that Kubernetes would start; it fills in variables as Kubernetes and KubeRay do."""

    def __init__(self) -> None:
        super().__init__()
        self.node_manager_port = free_port()

    def filled(self, text: str, pod: str, address: str) -> str:
        """Return an argument or value as the container sees it, with ports that are free here."""
        variables = {"POD_IP": address, "POD_NAME": pod, "FQ_RAY_IP": HEAD_IP}
        for name, value in variables.items():
            text = text.replace(f"$({name})", value)
        return text.replace("6379", str(self.port)).replace("6380", str(self.node_manager_port))

    def arguments(self, name: str, address: str) -> list[str]:
        """Return the arguments of the pod's Ray container; Ray's session lies apart from those of other tests."""
        container: dict[str, Any] = RAY if name == "head" else GPU["containers"][0]
        assert container["command"] == ["tini", "--", "hostler-ray"]
        filled = [self.filled(each, name, address) for each in container["args"]]
        return [*filled, f"--temp-dir={self.directory}"] if name == "head" else filled


@pytest.fixture
def pods() -> Iterator[Pods]:
    cluster = Pods()
    try:
        yield cluster
    finally:
        cluster.close()


def test_the_head_serves_and_the_other_pod_computes(pods: Pods, hostler_server: Servers) -> None:
    (text,) = next(each for each in DOCUMENTS if each["kind"] == "ConfigMap")["data"].values()
    config = yaml.safe_load(text) | {"models": [{"name": "a", "engine": "scripted", "kv_cache": "300MB"}]}
    values = {each["name"]: each["value"] for each in SERVER["env"] if "value" in each}
    here = {
        "HOSTLER_HOST": "127.0.0.1",
        "HOSTLER_RAY_ADDRESS": pods.filled(values["HOSTLER_RAY_ADDRESS"], "head", HEAD_IP),
    }
    pods.start("head", HEAD_IP)
    pods.start(GPU_POD, GPU_IP)
    server = hostler_server(config=yaml.safe_dump(config), env=pods.environment | here)
    wait_until(lambda: f"{GPU_POD}/cpu" in devices(server), 40, "the other pod's device", every_s=0.1)
    ask(server, "a")
    placed = ready(server)["a"]
    assert placed.node == GPU_POD
    assert placed.replica.address.startswith(f"{GPU_IP}:")
    assert next(device for device in status(server).devices if device.id == "cpu").budget_bytes == 1
