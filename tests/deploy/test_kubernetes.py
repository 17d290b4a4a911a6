"""deploy/kubernetes: the schemas of Kubernetes, strictly, and that the objects agree with each other and the code."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from alpaca_lora import __version__
from alpaca_lora.errors import AlpacaLoraError, ConfigError
from alpaca_lora.server.app import OPEN_PATHS
from alpaca_lora.server.keys import KeyRing
from tests.deploy.deploy_files import CONFIG, DEPLOY, ENDING_SECONDS, changed, documents, serve_config

FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION = documents(FOLDER / "kustomization.yaml")[0]
BESIDE = {"secret.example.yml", "files-pod.yml", "servicemonitor.yml"}  # applied by hand, or not at all
OBJECTS = {
    path.stem: documents(path) for path in sorted(FOLDER.glob("*.yml")) if path.name != "serve.yml"
}  # file -> its objects
BUILT_IN = [(name, number) for name, all_of in OBJECTS.items() for number in range(len(all_of))]
BUILT_IN.remove(("servicemonitor", 0))  # a custom resource
GIB = 2**30


def problems(objects: dict[str, Any]) -> list[str]:
    """Where the objects do not fit together, or are less locked up than they should be."""
    deployment = objects["deployment"][0]["spec"]
    pod = deployment["template"]
    labels = pod["metadata"]["labels"]
    found = [
        f"{name} selects other pods"
        for name, selected in (
            ("deployment", deployment["selector"]["matchLabels"]),
            ("service", objects["service"][0]["spec"]["selector"]),
            ("disruption", objects["disruption"][0]["spec"]["selector"]["matchLabels"]),
            ("networkpolicy", objects["networkpolicy"][0]["spec"]["podSelector"]["matchLabels"]),
        )
        if selected != labels
    ]
    monitor, service = objects["servicemonitor"][0]["spec"], objects["service"][0]
    if not monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items():
        found.append("the monitor finds no service")
    if service["metadata"]["labels"].get(monitor["jobLabel"]) != "alpaca-lora":
        found.append("the job has another name than in alerts.yml")
    if monitor["endpoints"][0]["port"] not in [port["name"] for port in service["spec"]["ports"]]:
        found.append("the monitor asks a port that is not there")
    credentials, secret = monitor["endpoints"][0]["authorization"]["credentials"], objects["secret.example"][0]
    if credentials["name"] != secret["metadata"]["name"] or credentials["key"] not in secret["stringData"]:
        found.append("the monitor's key is not in the secret")
    if objects["files-pod"][0]["metadata"]["labels"].items() >= labels.items():
        found.append("the pod of files is taken for the service")
    for name, spec in (("deployment", pod["spec"]), ("files-pod", objects["files-pod"][0]["spec"])):
        found += [f"{name}: {what}" for what in (*_unlocked(spec), *_volumes(spec, objects))]
    return found + _server(pod["spec"], objects)


def _unlocked(pod: Any) -> list[str]:
    """What the level `restricted` of Kubernetes' pod security asks for, and a read-only root."""
    container = pod["containers"][0]
    own, of_pod = container["securityContext"], pod["securityContext"]
    wanted = [
        ("root", of_pod.get("runAsNonRoot") is True and of_pod.get("runAsUser") == 10001),
        ("seccomp", of_pod.get("seccompProfile") == {"type": "RuntimeDefault"}),
        ("more privileges", own.get("allowPrivilegeEscalation") is False),
        ("capabilities", own.get("capabilities") == {"drop": ["ALL"]}),
        ("a root that can be written to", own.get("readOnlyRootFilesystem") is True),
        ("a token of the cluster", pod.get("automountServiceAccountToken") is False),
        ("no limits", {"cpu", "memory"} <= container["resources"].get("limits", {}).keys()),
        ("another image", container["image"] == f"alpaca-lora:{__version__}"),
    ]
    return [what for what, holds in wanted if not holds]


def _volumes(pod: Any, objects: dict[str, Any]) -> list[str]:
    claims = {one["metadata"]["name"] for one in objects["storage"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = pod["containers"][0]["volumeMounts"]
    found = [f"{one['name']} is no volume" for one in mounts if one["name"] not in volumes]
    found += [f"{name} is not mounted" for name in volumes if name not in [one["name"] for one in mounts]]
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim")
        if claim and claim["claimName"] not in claims:
            found.append(f"no claim {claim['claimName']}")
        config = volume.get("configMap")
        if config and config["name"] not in [one["name"] for one in KUSTOMIZATION["configMapGenerator"]]:
            found.append(f"no ConfigMap {config['name']}")
        if secret := volume.get("secret"):
            example = objects["secret.example"][0]
            keys = {item["key"] for item in secret["items"]}
            if secret["secretName"] != example["metadata"]["name"] or not keys <= example["stringData"].keys():
                found.append("the secret has another form than its example")
    return found


def _server(pod: Any, objects: dict[str, Any]) -> list[str]:
    container = pod["containers"][0]
    try:
        config = serve_config(container["args"], FOLDER / "serve.yml")
    except (AlpacaLoraError, KeyError) as error:
        return [f"the command: {error}"]
    mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
    secret = next(one["secret"] for one in pod["volumes"] if "secret" in one)
    keys_folder = next(path for path, one in mounts.items() if one["name"] == "keys")
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * GIB
    written = {path for path, one in mounts.items() if not one.get("readOnly")}
    wanted = [
        ("the configuration is not mounted", CONFIG.rpartition("/")[0] in mounts),
        ("the keys are elsewhere", config.api_keys_file in [f"{keys_folder}/{i['path']}" for i in secret["items"]]),
        ("adapter_dir is not mounted, or can be written to", mounts.get(config.adapter_dir, {}).get("readOnly")),
        ("the model is not mounted", any(config.base_model.startswith(f"{path}/") for path in mounts)),
        ("other places are written to", written == {"/tmp", "/var/cache/alpaca-lora"}),
        ("another port", ports == {"http": config.port} and config.host == "0.0.0.0"),
        ("the service leads to another port", objects["service"][0]["spec"]["ports"][0]["targetPort"] in ports),
        ("probes ask another port", {one["port"] for one in probes.values()} <= ports.keys()),
        ("probes need a key", {one["path"] for one in probes.values()} <= set(OPEN_PATHS)),
        ("ready and alive are one", probes["readiness"]["path"] == "/ready" != probes["liveness"]["path"]),
        (
            "the grace period ends before the answers",
            pod["terminationGracePeriodSeconds"] >= sleep + config.drain_timeout + ENDING_SECONDS,
        ),
        ("the cache alone is half of the memory", config.kv_cache_gb and config.kv_cache_gb * 1e9 < memory / 2),
    ]
    return [what for what, holds in wanted if not holds]


# ---- the schemas


@pytest.mark.parametrize(("name", "number"), BUILT_IN)
def test_each_object_fits_its_schema(name: str, number: int) -> None:
    version = kubernetes_validate.latest_version()
    one = OBJECTS[name][number]
    kubernetes_validate.validate(one, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**one, "spce": {}}, version, strict=True)


def test_a_misspelt_field_is_noticed() -> None:
    version = kubernetes_validate.latest_version()
    place = ("spec", "template", "spec", "containers", 0, "securityContext")
    security = OBJECTS["deployment"][0]["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    for value in ({**security, "readOnlyRootFileSystem": True}, {**security, "runAsUser": "10001"}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(changed(OBJECTS["deployment"][0], place, value), version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which renders kustomizations")
def test_what_kustomize_makes_fits_too(tmp_path: Path) -> None:
    """kubectl asks no cluster for this."""
    copied = shutil.copytree(FOLDER, tmp_path / "kubernetes")
    command = ["kubectl", "kustomize", str(copied)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    for one in made:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    config = next(one for one in made if one["kind"] == "ConfigMap")
    assert config["data"]["serve.yml"] == (FOLDER / "serve.yml").read_text()
    deployment = next(one for one in made if one["kind"] == "Deployment")
    volumes = {one["name"]: one for one in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"] != "alpaca-lora-config"
    assert {one["metadata"].get("namespace") for one in made} == {None, "alpaca-lora"}


# ---- what they say


def test_they_fit_together() -> None:
    assert problems(OBJECTS) == []


SERVER = ("deployment", 0, "spec", "template", "spec")
CONTAINER = (*SERVER, "containers", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("service", 0, "spec", "selector"), {"app": "alpaca-lora"}),
        (("disruption", 0, "spec", "selector", "matchLabels"), {"app": "x"}),
        (("servicemonitor", 0, "spec", "jobLabel"), "app"),
        (("servicemonitor", 0, "spec", "endpoints", 0, "port"), "metrics"),
        (("servicemonitor", 0, "spec", "endpoints", 0, "authorization", "credentials", "key"), "key"),
        (("files-pod", 0, "metadata", "labels", "app.kubernetes.io/component"), "server"),
        (("files-pod", 0, "spec", "automountServiceAccountToken"), ...),
        ((*SERVER, "terminationGracePeriodSeconds"), 40),
        ((*SERVER, "securityContext", "runAsNonRoot"), False),
        ((*SERVER, "securityContext", "seccompProfile"), ...),
        ((*SERVER, "volumes", 0, "configMap", "name"), "config"),
        ((*SERVER, "volumes", 1, "secret", "items", 0, "key"), "keys"),
        ((*SERVER, "volumes", 2, "persistentVolumeClaim", "claimName"), "adapters"),
        ((*SERVER, "volumes", 5), ...),
        ((*CONTAINER, "securityContext", "capabilities"), ...),
        ((*CONTAINER, "securityContext", "readOnlyRootFilesystem"), False),
        ((*CONTAINER, "resources", "limits", "memory"), "1Gi"),
        ((*CONTAINER, "image"), "alpaca-lora:latest"),
        ((*CONTAINER, "args", 1), "--conf"),
        ((*CONTAINER, "ports", 0, "containerPort"), 8080),
        ((*CONTAINER, "livenessProbe", "httpGet", "path"), "/ready"),
        ((*CONTAINER, "readinessProbe", "httpGet", "path"), "/metrics"),
        ((*CONTAINER, "startupProbe", "httpGet", "port"), 8080),
        ((*CONTAINER, "volumeMounts", 1, "mountPath"), "/run/secrets"),
        ((*CONTAINER, "volumeMounts", 2, "readOnly"), False),
        ((*CONTAINER, "volumeMounts", 3, "mountPath"), "/models"),
    ],
)
def test_a_broken_copy_is_noticed(path: tuple[str | int, ...], value: Any) -> None:
    assert problems(changed(OBJECTS, path, value)) != []


def test_the_kustomization_names_every_file() -> None:
    files = {path.name for path in FOLDER.iterdir()} - BESIDE - {"kustomization.yaml", "serve.yml"}
    assert set(KUSTOMIZATION["resources"]) == files
    assert [one["files"] for one in KUSTOMIZATION["configMapGenerator"]] == [["serve.yml"]]
    assert KUSTOMIZATION["images"] == [
        {"name": "alpaca-lora", "newName": "alpaca-lora", "newTag": __version__}
    ]  # fmt: skip
    assert KUSTOMIZATION["namespace"] == OBJECTS["namespace"][0]["metadata"]["name"]


def test_the_keys_of_the_example_let_nobody_in() -> None:
    example = OBJECTS["secret.example"][0]["stringData"]
    with pytest.raises(ConfigError):
        KeyRing.from_text(example["api_keys"], "example")
    for word in example["api_keys"].split():
        with pytest.raises(ConfigError):
            KeyRing.from_text(word, "example")
    assert f"metrics:{example['metrics_key']}" in example["api_keys"].split()
    assert (
        len(KeyRing.from_text(example["api_keys"].replace("change-me", "k" * 16), "example")) == 1
    )  # the form is right


def test_the_service_asks_nobody() -> None:
    policy = OBJECTS["networkpolicy"][0]["spec"]
    assert policy["egress"] == [] and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == ["http"]
    assert all("from" in rule for rule in policy["ingress"])


def test_what_the_pod_of_files_pulls_is_where_the_service_looks() -> None:
    container = OBJECTS["files-pod"][0]["spec"]["containers"][0]
    home = {one["name"]: one["value"] for one in container["env"]}["ALPACA_LORA_HOME"]
    config = serve_config(["serve", "--config", CONFIG], FOLDER / "serve.yml")
    # weights/packaged.py keeps an alias in models/ALIAS below the home
    assert config.base_model == f"{home}/models/{config.served_model_name}"
