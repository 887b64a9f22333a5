"""The manifests as Kubernetes gets them: rendered by `kubectl kustomize`, with values looked up in them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from tests.command import ROOT

yaml = pytest.importorskip("yaml")

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = ("sim", "vllm", "kuberay")

Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> list[Object]:
    """Every object of an overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("NOT CHECKED: kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", FOLDER / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def find(overlay: str, kind: str, name: str) -> Object:
    """One object."""
    found = [one for one in rendered(overlay) if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, (kind, name)
    return found[0]


def workloads(overlay: str) -> dict[str, Object]:
    """Pod templates by component: proxy, prefill and decode, or head and worker of a Ray cluster."""
    found = {}
    for one in rendered(overlay):
        if one["kind"] in ("StatefulSet", "Deployment"):
            template = one["spec"]["template"]
            found[template["metadata"]["labels"]["app.kubernetes.io/component"]] = template
        if one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                found[group["template"]["metadata"]["labels"]["disagg/ray"]] = group["template"]
    return found


def container(template: Object) -> Object:
    """The only container of a pod."""
    [only] = template["spec"]["containers"]
    return dict(only)


def environment(one: Object, pod: Mapping[str, str]) -> dict[str, str]:
    """What a container sees. ``pod`` has the values of field and secret references, by path and key."""
    found: dict[str, str] = {}
    for entry in one.get("env", ()):
        source = entry.get("valueFrom", {})
        if "fieldRef" in source:
            found[entry["name"]] = pod[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            if (key := source["secretKeyRef"]["key"]) in pod:
                found[entry["name"]] = pod[key]
        else:
            found[entry["name"]] = expanded(entry["value"], found)
    return found


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` filled in, as Kubernetes does for commands, arguments and variables: of what stands before."""
    filled = re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)
    assert "$(" not in filled, f"{filled}: not defined, or defined later"
    return filled


def words(one: Object, variables: Mapping[str, str]) -> list[str]:
    """Command and arguments of a container."""
    return [expanded(word, variables) for word in (*one.get("command", ()), *one.get("args", ()))]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector fits."""
    fits = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "Exists"
        fits = fits and rule["key"] in labels
    return fits
