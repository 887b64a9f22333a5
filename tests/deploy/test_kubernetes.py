"""The manifests: valid, and with the ports, probes, settings, flags and times of the code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from disagg_kv.settings import Settings
from disagg_machine import table
from disagg_proxy.config.table import SETTINGS
from disagg_sim.cli import main as sim
from tests.command import ROOT
from tests.deploy.kubernetes import (
    FOLDER,
    OVERLAYS,
    container,
    environment,
    find,
    rendered,
    selects,
    words,
    workloads,
    yaml,
)

DEFAULTS = {setting.env: setting.default for setting in SETTINGS}
PROXY = {setting.env: setting for setting in SETTINGS}
ENGINES = ("prefill", "decode")
WITH_ENGINES = ("sim", "vllm")
POD = {
    "status.podIP": "10.8.0.7",
    "kv-secret": "s",
    "admin-key": "a",
    "engine-api-key": "e",
    "api-key": "k",
}
TEMPLATES = [(overlay, part) for overlay in WITH_ENGINES for part in ("proxy", *ENGINES)]
TEMPLATES += [("kuberay", "head"), ("kuberay", "worker")]
TEMPLATE = pytest.mark.parametrize(("overlay", "part"), TEMPLATES)


def engine_words(overlay: str, role: str) -> list[str]:
    one = container(workloads(overlay)[role])
    return words(one, environment(one, POD))


def transfer(role: str) -> dict[str, Any]:
    """--kv-transfer-config of a vLLM engine."""
    [text] = [word for word in engine_words("vllm", role) if word.startswith("--kv-transfer-config=")]
    read: dict[str, Any] = json.loads(text.partition("=")[2])
    return read


# -- the schema


@pytest.mark.parametrize("version", ["1.30", "latest"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_accepts_it(overlay: str, version: str) -> None:
    """From 1.30 on: the first release with `preStop.sleep`."""
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="NOT CHECKED: kubernetes-validate is missing"
    )
    version = kubernetes_validate.latest_version() if version == "latest" else version
    for one in rendered(overlay):
        if one["kind"] != "RayService":  # KubeRay's own; its pods are below
            kubernetes_validate.validate(one, version, strict=True)
    for name, template in workloads(overlay).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": name}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_referred_to_is_there(overlay: str) -> None:
    labels = {name: one["metadata"]["labels"] for name, one in workloads(overlay).items()}
    for one in rendered(overlay):
        kind, spec = one["kind"], one.get("spec", {})
        if kind == "Service":
            chosen = [part for part, found in labels.items() if selects({"matchLabels": spec["selector"]}, found)]
            assert len(chosen) == 1
            names = {port["name"] for port in container(workloads(overlay)[chosen[0]])["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= names
        if kind in ("StatefulSet", "Deployment"):
            assert selects(spec["selector"], spec["template"]["metadata"]["labels"])
        if kind == "PodDisruptionBudget":
            assert sum(selects(spec["selector"], found) for found in labels.values()) == 1
        if kind == "NetworkPolicy":
            assert any(selects(spec["podSelector"], found) for found in labels.values())
            for peer in (peer for rule in spec["ingress"] for peer in rule.get("from", ())):
                outside = "namespaceSelector" in peer
                assert outside or any(selects(peer["podSelector"], found) for found in labels.values())


@TEMPLATE
def test_mounts_have_volumes_and_pods_no_root(overlay: str, part: str) -> None:
    spec = workloads(overlay)[part]["spec"]
    one = container({"spec": spec})
    assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    for volume in spec["volumes"]:
        if "configMap" in volume:
            find(overlay, "ConfigMap", volume["configMap"]["name"])
    context = spec["securityContext"]
    dockerfiles = [(ROOT / "deploy/docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.engine")]
    users = re.findall(r"^USER (\d+):(\d+)$", "\n".join(dockerfiles), re.M)
    assert {(str(context["runAsUser"]), str(context["fsGroup"]))} == set(users) and context["runAsNonRoot"] is True
    if overlay != "kuberay":
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert spec["automountServiceAccountToken"] is False


@TEMPLATE
def test_images_and_keys_are_those_of_the_documentation(overlay: str, part: str) -> None:
    page = (ROOT / "docs/kubernetes.md").read_text()
    spec = workloads(overlay)[part]["spec"]
    one = container({"spec": spec})
    assert f"-t {one['image']} " in page
    made = set(re.findall(r"--from-literal=([\w-]+)=", page))
    used = {entry["valueFrom"]["secretKeyRef"]["key"] for entry in one.get("env", ()) if "secretKeyRef" in str(entry)}
    mounted = {
        item["path"]: item["key"] for volume in spec["volumes"] for item in volume.get("secret", {}).get("items", ())
    }
    assert used | set(mounted.values()) <= made and all(path == key for path, key in mounted.items())
    # The shared secret is a file, which no variable and no command line shows.
    assert "kv-secret" in mounted and "kv-secret" not in used
    for volume in spec["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert claim["claimName"] in page


# -- the proxy


@pytest.mark.parametrize("overlay", WITH_ENGINES)
def test_settings_and_ports_of_the_proxy(overlay: str) -> None:
    one = container(workloads(overlay)["proxy"])
    for name, value in environment(one, POD).items():
        PROXY[name].read(value)
    ports = {port["name"]: str(port["containerPort"]) for port in one["ports"]}
    assert ports == {"http": DEFAULTS["HTTP_PROXY_PORT"], "registration": DEFAULTS["PROXY_PORT"]}
    [registration] = find(overlay, "Service", "disagg-registration")["spec"]["ports"]
    assert str(registration["port"]) == DEFAULTS["PROXY_PORT"], "a headless service does not translate ports"


@pytest.mark.parametrize("overlay", WITH_ENGINES)
def test_proxies_can_be_found_before_they_are_ready(overlay: str) -> None:
    """They are ready once engines have registered."""
    service = find(overlay, "Service", "disagg-registration")["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"] is True
    proxies = find(overlay, "StatefulSet", "disagg-proxy")["spec"]
    assert proxies["serviceName"] == "disagg-registration" and proxies["podManagementPolicy"] == "Parallel"


@pytest.mark.parametrize("overlay", WITH_ENGINES)
def test_engines_announce_themselves_to_every_proxy_and_the_proxies_divide_the_limit(overlay: str) -> None:
    proxies = find(overlay, "StatefulSet", "disagg-proxy")
    count, service = proxies["spec"]["replicas"], proxies["spec"]["serviceName"]
    names = [f"disagg-proxy-{number}.{service}:{DEFAULTS['PROXY_PORT']}" for number in range(count)]
    for role in ENGINES:
        assert environment(container(workloads(overlay)[role]), POD)["PROXIES"] == ",".join(names)
    limit = int(environment(container(workloads(overlay)["proxy"]), POD)["DECODE_MAX_IN_FLIGHT"])
    assert limit * count == int(DEFAULTS["DECODE_MAX_IN_FLIGHT"])


@pytest.mark.parametrize("overlay", WITH_ENGINES)
def test_times_of_a_shutdown_fit(overlay: str) -> None:
    proxy = workloads(overlay)["proxy"]["spec"]
    one = container({"spec": proxy})
    before = one["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert proxy["terminationGracePeriodSeconds"] >= before + float(environment(one, POD)["SHUTDOWN_GRACE"]) + 5
    for role in ENGINES:
        spec = workloads(overlay)[role]["spec"]
        drain = int(environment(container({"spec": spec}), POD)["DRAIN_SECONDS"])
        stop = int(table.BY_ENV["STOP_TIMEOUT"].default)
        assert drain <= 3600, "the longest `wait` of /admin/drain"
        assert spec["terminationGracePeriodSeconds"] >= drain + 5 + stop


@pytest.mark.parametrize("overlay", WITH_ENGINES)
def test_probes(overlay: str) -> None:
    """That these routes answer so is in test_kubernetes_run.py and tests/health."""
    parts = workloads(overlay)
    for part, (startup, liveness, readiness) in {
        "proxy": ("/livez", "/livez", "/health"),
        **dict.fromkeys(ENGINES, ("/health", "/health", "/health")),
    }.items():
        one = container(parts[part])
        found = [one[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
        assert [probe["path"] for probe in found] == [startup, liveness, readiness]
        assert {probe["port"] for probe in found} == {"http"}
    for role in ENGINES:
        probe = container(parts[role])["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800, "START_TIMEOUT with vllm"


def test_who_may_connect_to_whom() -> None:
    def rules(name: str) -> list[dict[str, Any]]:
        return list(find("vllm", "NetworkPolicy", name)["spec"]["ingress"])

    parts = {name: one["metadata"]["labels"] for name, one in workloads("vllm").items()}

    def sources(rule: dict[str, Any]) -> set[str]:
        return {name for peer in rule["from"] for name, one in parts.items() if selects(peer["podSelector"], one)}

    clients, registration = rules("disagg-proxy")
    assert "from" not in clients and [port["port"] for port in clients["ports"]] == ["http"]
    assert sources(registration) == set(ENGINES) and [port["port"] for port in registration["ports"]] == [
        "registration"
    ]
    proxies, engines = rules("disagg-engines")
    assert sources(proxies) == {"proxy"} and sources(engines) == set(ENGINES) and "ports" not in engines
    http, kv = proxies["ports"]
    assert http == {"port": "http"}
    for role in ENGINES:
        first = transfer(role)["kv_port"]
        [ranks] = [word.partition("=")[2] for word in engine_words("vllm", role) if "tensor-parallel" in word]
        assert kv["port"] <= first <= first + int(ranks) - 1 <= kv["endPort"]


# -- engines


@pytest.mark.parametrize("role", ENGINES)
def test_commands_of_simulated_engines(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *flags = engine_words("sim", role)
    ports = {port["name"]: port["containerPort"] for port in container(workloads("sim")[role])["ports"]}
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert command == "sim" and given["--role"] == role and given["--host"] == POD["status.podIP"]
    assert (int(given["--port"]), int(given["--kv-port"])) == (ports["http"], ports["kv"])
    with pytest.raises(SystemExit) as ended:
        sim([*flags, "--help"])
    assert ended.value.code == 0 and all(flag in capsys.readouterr().out for flag in list(given)[:1])


@pytest.mark.parametrize("role", ENGINES)
def test_commands_of_vllm_engines(role: str) -> None:
    one = container(workloads("vllm")[role])
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    program, command, model, *flags = engine_words("vllm", role)
    given = dict(flag.split("=", 1) for flag in flags)
    assert (program, command) == ("vllm", "serve")
    assert any(model.startswith(mount["mountPath"] + "/") for mount in one["volumeMounts"])
    assert (given["--host"], given["--port"]) == (POD["status.podIP"], str(ports["http"]))
    config = transfer(role)
    assert config["kv_role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[role]
    assert role == "prefill" or config["kv_load_failure_policy"] == "recompute"
    assert config["kv_port"] == ports["kv"]
    settings = Settings.load(config["kv_connector_extra_config"], {})
    assert settings.host_ip == settings.listen == POD["status.podIP"] and settings.may_connect("10.1.2.3")
    assert settings.http_port == ports["http"] and len(settings.announce_to) == 2 and not settings.peers_too_narrow
    assert int(one["resources"]["limits"]["nvidia.com/gpu"]) == int(given["--tensor-parallel-size"])
    if role == "decode":
        assert given["--max-num-seqs"] == DEFAULTS["DECODE_MAX_IN_FLIGHT"]


@pytest.mark.parametrize("overlay", WITH_ENGINES)
@pytest.mark.parametrize("role", ENGINES)
def test_an_engine_is_drained_before_it_stops(overlay: str, role: str) -> None:
    template = workloads(overlay)[role]
    hooks = container(template)["lifecycle"]
    mount = {one["name"]: one["mountPath"] for one in container(template)["volumeMounts"]}["hooks"]
    [name] = [one["configMap"]["name"] for one in template["spec"]["volumes"] if one["name"] == "hooks"]
    assert find(overlay, "ConfigMap", name)["data"]["drain.py"] == (FOLDER / "base/drain.py").read_text()
    for hook, action in (("preStop", "drain"), ("postStart", "undrain")):
        assert hooks[hook]["exec"]["command"] == ["python3", f"{mount}/drain.py", action]


# -- KubeRay


def ray_service() -> dict[str, Any]:
    spec: dict[str, Any] = find("kuberay", "RayService", "disagg")["spec"]
    return spec


def test_the_serve_config_is_a_cluster_file() -> None:
    [application] = yaml.safe_load(ray_service()["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert (module, function) == ("disagg_ray.app", "build")
    args = application["args"]
    groups = ray_service()["rayClusterConfig"]["workerGroupSpecs"]
    assert sum(group["replicas"] for group in groups) == args["prefill"]["count"] + args["decode"]["count"]
    head = container(workloads("kuberay")["head"])
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert (args["proxy"]["port"], args["proxy"]["registration_port"]) == (ports["http"], ports["registration"])
    settings = pytest.importorskip("disagg_ray.settings")
    cluster = settings.parse(args)
    grace = workloads("kuberay")["worker"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= cluster.drain_timeout + cluster.stop_timeout + 5
    mounts = [mount["mountPath"] for mount in container(workloads("kuberay")["worker"])["volumeMounts"]]
    assert any(cluster.secret_file.startswith(mount) for mount in mounts)
    assert any(cluster.model.startswith(mount) for mount in mounts)


def test_ray_is_the_version_of_the_image() -> None:
    image = (ROOT / "deploy/docker/Dockerfile.engine").read_text()
    assert f"ARG RAY_VERSION={ray_service()['rayClusterConfig']['rayVersion']}\n" in image
