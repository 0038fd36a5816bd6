"""docker/: what can be known of images, the compose file and the manifests without Docker and without a cluster."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda")
MANIFESTS = sorted(path for path in (DOCKER / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
KUBERNETES = ("1.29", "1.31", "1.33")
UNPINNED = "vllm/vllm-openai:v0.32.0"  # the file says why
POD_MONITOR: dict[str, Any] = {  # what we say of the operator's own schema, which no validator brings
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {"type": "object", "required": ["matchLabels"], "additionalProperties": False,
                     "properties": {"matchLabels": {"type": "object"}}},
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string", "pattern": "^/"},
                    "interval": {"type": "string", "pattern": "^[0-9]+s$"},
                    "relabelings": {
                        "type": "array",
                        "items": {"type": "object", "additionalProperties": False,
                                  "properties": {"targetLabel": {"type": "string"}, "replacement": {"type": "string"}}},
                    },
                },
            },
        },
    },
}  # fmt: skip


def tool(name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    path = Path(sys.executable).parent / name
    return subprocess.run([path, *words], capture_output=True, text=True, timeout=120)


def documents() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in MANIFESTS:
        for one in yaml.safe_load_all(path.read_text()):
            yield path, one


def the(kind: str) -> dict[str, Any]:
    (found,) = [one for _, one in documents() if one["kind"] == kind]
    return found


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def instructions(path: Path, name: str) -> list[str]:
    text = re.sub(r"\\\n\s*", "", path.read_text())
    return re.findall(rf"^{name} (.+)$", text, re.M)


# ---- images


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = tool("hadolint", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILES[0].read_text().replace(" --no-install-recommends", ""))
    assert "DL3015" in tool("hadolint", str(tmp_path / "Dockerfile")).stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_runs_as_nobody_and_tells_its_health(path: Path) -> None:
    images = dict(one.split("=", 1) for one in instructions(path, "ARG") if "_IMAGE=" in one)
    assert all(re.search(r"@sha256:[0-9a-f]{64}$", image) for image in images.values() if image != UNPINNED)
    assert len(stages := instructions(path, "FROM")) == 2
    assert all(re.match(r"\$\{(\w+)\}", stage)[1] in images for stage in stages)  # type: ignore[index]
    assert instructions(path, "USER") == ["10001:10001"] and instructions(path, "STOPSIGNAL") == ["SIGTERM"]
    (health,) = instructions(path, "HEALTHCHECK")
    assert "--start-period=300s" in health and ":8000/ready" in health
    (volumes,) = instructions(path, "VOLUME")
    assert json.loads(volumes) == ["/models", "/registry", "/cache"]
    (entry,) = instructions(path, "ENTRYPOINT")
    assert json.loads(entry)[0].endswith("whipstaff")  # itself, and no shell, gets the signal
    written = " ".join(instructions(path, "ENV"))
    assert all(f"{name}=/cache" in written for name in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"))


def test_what_is_built_here_stays_out_of_the_context() -> None:
    assert set((DOCKER.parent / ".dockerignore").read_text().split()) >= {".git", ".venv", "**/*.so", "build"}


# ---- compose


def test_the_compose_file_is_one(tmp_path: Path) -> None:
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = tool(*check, str(DOCKER / "compose.yaml"))
    assert done.returncode == 0, done.stdout
    (tmp_path / "compose.yaml").write_text((DOCKER / "compose.yaml").read_text().replace("tmpfs:", "tmp_fs:"))
    assert tool(*check, str(tmp_path / "compose.yaml")).returncode == 1


def test_the_services_find_one_another() -> None:
    services = compose()["services"]
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["job_name"] == "whipstaff" and job["static_configs"] == [{"targets": ["server:8000"]}]
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and {"server", "prometheus", "grafana"} == services.keys()
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/whipstaff.yaml").read_text())["providers"]
    mounted = dict(one.removesuffix(":ro").rsplit(":", 1)[::-1] for one in services["grafana"]["volumes"])
    assert (DOCKER / mounted[provider["options"]["path"]] / "overview.json").exists()
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DOCKER / mounted[str(Path(home).parent)] / Path(home).name).exists()
    assert (DOCKER / mounted["/etc/grafana/provisioning"] / "datasources").is_dir()


def test_nothing_is_open_to_others_and_nothing_has_a_password_of_ours() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert "build" in service or re.search(r"@sha256:[0-9a-f]{64}$", service["image"]), name
    assert re.search(r"GF_SECURITY_ADMIN_PASSWORD: \$\{\w+:\?", (DOCKER / "compose.yaml").read_text())


# ---- Kubernetes


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_manifests_are_what_kubernetes_takes(version: str, tmp_path: Path) -> None:
    done = tool("kubernetes-validate", "--strict", "-k", version, *map(str, MANIFESTS))
    assert done.returncode == 0, done.stdout + done.stderr
    unknown = re.findall(r"find schema for kind (\w+)", done.stdout + done.stderr)
    assert unknown == ["PodMonitor"]
    wrong = tmp_path / "deployment.yaml"
    wrong.write_text((DOCKER / "kubernetes/deployment.yaml").read_text().replace("failureThreshold", "failures"))
    assert tool("kubernetes-validate", "--strict", "-k", version, str(wrong)).returncode != 0


def test_the_pod_monitor_is_what_the_operator_takes() -> None:
    monitor = the("PodMonitor")
    jsonschema.validate(monitor["spec"], POD_MONITOR)
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert {"targetLabel": "job", "replacement": "whipstaff"} in monitor["spec"]["podMetricsEndpoints"][0][
        "relabelings"
    ]


def test_the_manifests_are_all_listed_and_speak_of_one_pod() -> None:
    listed = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]
    labels = {"app.kubernetes.io/name": "whipstaff"}
    pod = the("Deployment")["spec"]["template"]
    assert pod["metadata"]["labels"] == labels == the("Service")["spec"]["selector"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert the(kind)["spec"]["selector"]["matchLabels"] == labels
    (server,) = pod["spec"]["containers"]
    (port,) = server["ports"]
    assert the("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    probed = [server[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [one["path"] for one in probed] == ["/ready", "/ready", "/health"]
    claimed = {
        one["persistentVolumeClaim"]["claimName"] for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one
    }
    assert claimed == {one["metadata"]["name"] for _, one in documents() if one["kind"] == "PersistentVolumeClaim"}


def test_pods_follow_the_queue_by_a_name_that_the_metrics_api_takes() -> None:
    scaling = the("HorizontalPodAutoscaler")["spec"]
    (metric,) = scaling["metrics"]
    name = metric["pods"]["metric"]["name"]
    text = (DOCKER / "kubernetes" / "scaling.yaml").read_text()
    assert re.fullmatch(r"\w+", name) and f'as: "{name}"' in text and "vllm:num_requests_waiting" in text
    grace = the("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert scaling["behavior"]["scaleDown"]["stabilizationWindowSeconds"] > grace


# ---- the Dockerfile, performed


def performer() -> Any:
    spec = importlib.util.spec_from_file_location("perform", DOCKER / "perform.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docker_perform_takes_every_step_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what RUN runs, which takes root, a Debian and minutes."""
    perform, ran = performer(), []

    def run(stage: Any, command: str, binds: Any) -> None:
        ran.append((stage.root.name, stage.workdir, command, stage.variables().get("PIP_INDEX_URL")))
        if "--wheel" in command:
            (stage.root / "opt" / "whipstaff" / "bin").mkdir(parents=True)
            (stage.root / "opt" / "whipstaff" / "bin" / "whipstaff").touch()

    monkeypatch.setattr(perform, "run", run)
    (tmp_path / "base").mkdir()
    (tmp_path / "into").mkdir()
    given = {"PIP_INDEX_URL": "there"}
    perform.perform(DOCKERFILES[0], tmp_path / "base", tmp_path / "into", [], given)
    build, final = tmp_path / "into" / "build" / "build", tmp_path / "into" / "final"
    assert (build / "requirements" / "cpu.lock").exists() and (build / "server" / "app.py").exists()
    found = {path.relative_to(build) for path in build.rglob("*")}
    assert not any(path.suffix in (".so", ".pyc") or path.parts[0] in (".git", ".venv", "build") for path in found)
    assert (final / "opt" / "whipstaff" / "bin" / "whipstaff").exists() and not (final / "build").exists()
    assert [(name, where) for name, where, _, _ in ran] == [
        ("build", "/"), ("build", "/build"), ("build", "/build"), ("final", "/"), ("final", "/"),
    ]  # fmt: skip
    assert [index for _, _, _, index in ran] == [None, "there", "there", None, None]  # an argument is its stage's own
    image = json.loads((tmp_path / "into" / "image.json").read_text())
    assert image["user"] == "10001:10001" and image["entrypoint"] == ["/opt/whipstaff/bin/whipstaff"]
    assert image["command"][0] == "serve" and image["environment"]["VLLM_CACHE_ROOT"] == "/cache/vllm"
    assert image["workdir"] == "/models" and image["volumes"] == ["/models", "/registry", "/cache"]


def test_a_step_that_nobody_wrote_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nONBUILD RUN true\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "into").mkdir()
    with pytest.raises(NotImplementedError, match="ONBUILD"):
        performer().perform(tmp_path / "Dockerfile", tmp_path / "base", tmp_path / "into", [], {})
