"""The Kubernetes manifest: judged by Kubernetes' and KubeRay's schemas and by kubectl, and kept to the image."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cli.settings import Flags, refuse_open_door, resolve
from tests.checks.tree import ROOT

from . import tools

FOLDER = ROOT / "deploy" / "kuberay"
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "hostler.yaml").read_text(encoding="utf-8")))
SPEC: dict[str, Any] = next(each["spec"] for each in DOCUMENTS if each["kind"] == "RayCluster")
HEAD: dict[str, Any] = SPEC["headGroupSpec"]["template"]["spec"]
(GPU,) = (group["template"]["spec"] for group in SPEC["workerGroupSpecs"])
RAY, SERVER = HEAD["containers"]
TYPES = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "Service": "io.k8s.api.core.v1.Service",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
}
STOPPING_BEYOND_DRAIN_S = 45


def document(kind: str) -> dict[str, Any]:
    return next(each for each in DOCUMENTS if each["kind"] == kind)


def complaints(documents: list[dict[str, Any]]) -> list[str]:
    """Return what the schemas of Kubernetes 1.33 (unknown keys forbidden) and of KubeRay 1.7 find."""
    kubernetes = json.loads(Path(tools.find("kubernetes-schemas")).read_text(encoding="utf-8"))
    kuberay = json.loads((Path(__file__).parent / "raycluster.schema.json").read_text(encoding="utf-8"))

    def judge(value: Any, schema: dict[str, Any]) -> list[str]:
        found = Draft202012Validator(schema).iter_errors(value)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]

    def judge_as(value: Any, name: str) -> list[str]:
        return judge(value, {"$ref": f"#/$defs/{name}", "$defs": kubernetes["$defs"]})

    found = []
    for each in documents:
        if each["kind"] in TYPES:
            found += judge_as(each, TYPES[each["kind"]])
            continue
        assert (each["apiVersion"], each["kind"]) == ("ray.io/v1", "RayCluster")
        found += judge_as(each["metadata"], "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
        found += judge(each["spec"], kuberay)
        for group in (each["spec"]["headGroupSpec"], *each["spec"]["workerGroupSpecs"]):
            found += judge_as(group["template"], "io.k8s.api.core.v1.PodTemplateSpec")
    return found


@pytest.mark.timeout(300)
def test_the_schemas_find_nothing() -> None:
    assert complaints(DOCUMENTS) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path", ["spec.rayVersions", "spec.headGroupSpec.templates", "spec.headGroupSpec.template.sepc"]
)
def test_a_misspelt_key_would_be_found(path: str) -> None:
    cluster = copy.deepcopy(document("RayCluster"))
    *parents, last = path.split(".")
    inner = cluster
    for parent in parents:
        inner = inner[parent]
    inner[last] = "x"
    assert any(last in complaint for complaint in complaints([cluster]))


def rendered(folder: Path) -> dict[str, Any]:
    """Return what `kubectl apply -k` would send, by kind."""
    command = [tools.find("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


def test_kubectl_reads_the_same_out_of_it() -> None:
    assert rendered(FOLDER) == {each["kind"]: each for each in DOCUMENTS}


def test_the_image_is_named_in_one_place(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "kuberay"))
    edited = folder / "kustomization.yaml"
    edited.write_text(edited.read_text().replace("newName: hostler,", "newName: registry.example.org/hostler,"))
    spec = rendered(folder)["RayCluster"]["spec"]
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    images = [each["image"] for group in groups for each in group["template"]["spec"]["containers"]]
    assert images == ["registry.example.org/hostler:cuda"] * 3


def test_the_configuration_is_one_that_serve_takes(tmp_path: Path) -> None:
    (text,) = document("ConfigMap")["data"].values()
    (tmp_path / "hostler.yaml").write_text(text, encoding="utf-8")
    environ = {each["name"]: each.get("value", "k" * 64) for each in SERVER["env"]}
    config, _ = resolve(Flags(config=tmp_path / "hostler.yaml"), environ)
    refuse_open_door(config)
    assert config.ray_address == "$(POD_IP):6379"
    assert HEAD["terminationGracePeriodSeconds"] >= config.drain_s + STOPPING_BEYOND_DRAIN_S
    assert [port["containerPort"] for port in SERVER["ports"]] == [config.port]


def test_every_pod_runs_the_image_as_its_user_and_without_rights() -> None:
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"^USER (\d+):", dockerfile, re.MULTILINE)
    for pod in (HEAD, GPU):
        assert pod["securityContext"]["runAsUser"] == int(user)
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["image"] == "hostler:cuda"
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_both_containers_of_the_head_share_what_they_meet_in() -> None:
    mounted = [{each["name"]: each["mountPath"] for each in container["volumeMounts"]} for container in (RAY, SERVER)]
    assert mounted[0].items() <= mounted[1].items()
    run_dir = next(each["value"] for each in SERVER["env"] if each["name"] == "HOSTLER_RUN_DIR")
    assert Path(run_dir).parent == Path(mounted[0]["run"])  # A volume belongs to root; what is made in it does not.
    assert HEAD["shareProcessNamespace"] is True


def test_only_the_api_is_open_to_others() -> None:
    rules = document("NetworkPolicy")["spec"]["ingress"]
    of_others = [
        rule for rule in rules if rule["from"] != [{"podSelector": {"matchLabels": {"ray.io/cluster": "hostler"}}}]
    ]
    assert [rule["ports"] for rule in of_others] == [[{"port": "http"}]]
