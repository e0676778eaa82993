"""The compose files as they stand, without Docker: what they name is there, and what they promise holds.

Where `docker compose` is installed, its own reader judges every combination too (`config --quiet`; no daemon needed).
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamgr import cli
from streamgr.config import Config, load

Json = dict[str, Any]
OURS = {"topics", "sequencer", "trainer", "scorer", "monitor", "feed"}
THEIRS = {"kafka", "kafka-exporter", "prometheus", "grafana"}
ONCE = {"topics"}  # runs to its end
# what the images bring along, of what a check may call
TOOLS = {
    "apache/kafka": {"nc"},
    "prom/prometheus": {"promtool", "wget"},
    "grafana/grafana": {"wget", "curl"},
    "danielqsj/kafka-exporter": {"wget"},
}
OVERRIDES = {
    "gpu.yaml": {},
    "external.yaml": {"KAFKA_BOOTSTRAP": "broker:9093", "KAFKA_USERNAME": "somebody"},
    "admin.yaml": {},
}


class Loader(yaml.SafeLoader):
    """Knows compose's own tags: `!reset` takes an inherited value away, `!override` replaces instead of merging."""


Loader.add_constructor("!reset", lambda loader, node: "!reset")
Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "compose"


@pytest.fixture
def services(folder: Path) -> dict[str, Json]:
    return read(folder / "compose.yaml")["services"]


def read(path: Path, **environ: str) -> Json:
    """The file with every `${NAME:-default}` replaced, by `environ` or its default."""
    document: Json = yaml.load(path.read_text(), Loader)
    replaced: Json = _replaced(document, environ)
    return replaced


def _replaced(value: Any, environ: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(v, environ) for key, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, environ) for v in value]
    if not isinstance(value, str):
        return value

    def default(match: re.Match[str]) -> str:
        name, how, text = match.groups()
        return environ.get(name, text if how in (":-", "-") else f"${name}")

    return re.sub(r"\$\{(\w+)(:-|-|:\?|\?)?([^}]*)\}", default, value)


def variables(service: Json) -> dict[str, str]:
    return {name: str(value) for name, value in (service.get("environment") or {}).items()}


def bound(service: Json) -> list[str]:
    """The host's paths that are mounted."""
    return [v.split(":")[0] for v in service.get("volumes", []) if v.startswith((".", "/"))]


def test_the_services_are_there_and_only_the_feed_is_left_to_a_profile(services: dict[str, Json]) -> None:
    assert set(services) == OURS | THEIRS
    assert {name: s["profiles"] for name, s in services.items() if "profiles" in s} == {"feed": ["demo"]}


def test_every_image_is_pinned_or_built_here_once(services: dict[str, Json], folder: Path) -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)", (folder / "Dockerfile").read_text(), re.MULTILINE)
    built = {s["image"]: s["build"]["target"] for s in services.values() if "build" in s}
    assert built == {f"streamgr:{target}": target for target in ("stream", "monitor", "cpu")}
    assert set(built.values()) <= set(stages)
    assert sum("build" in s for s in services.values()) == len(built)
    for name, service in services.items():
        if name in OURS:
            assert service["image"] in built
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: {service['image']}"


def test_torch_of_the_images_is_that_of_the_constraints(folder: Path, repository: Path) -> None:
    pinned = re.findall(r"^ARG TORCH=(\S+)$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    [wanted] = re.findall(r"^torch==(\S+)$", (repository / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned == [wanted, wanted]


def test_nothing_has_more_rights_than_it_needs(services: dict[str, Json]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert "privileged" not in service, name
        if name == "kafka":  # the image's own user, who writes the configuration into the image's own directory
            assert "user" not in service
            assert not service["read_only"]
        else:
            assert service["read_only"] is True, name
            assert service["user"].split(":")[0] not in ("0", "root"), name
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory", "pids"}, name
        assert float(limits["cpus"]) <= 2, f"{name}: a machine with two cores refuses more"
        assert service["logging"]["options"]["max-size"], name
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name


def test_ports_are_published_on_the_loopback_alone_and_are_those_of_the_configuration(
    services: dict[str, Json],
) -> None:
    published = {name: s["ports"] for name, s in services.items() if "ports" in s}
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for ports in published.values() for port in ports)
    config = Config()
    assert published["scorer"] == [f"127.0.0.1:{config.scorer.port}:{config.scorer.port}"]
    assert published["monitor"] == [f"127.0.0.1:{config.monitor.port}:{config.monitor.port}"]
    assert set(published) == {"kafka", "scorer", "monitor", "prometheus", "grafana"}


def test_every_service_is_watched_by_something_its_image_has(services: dict[str, Json]) -> None:
    for name, service in services.items():
        check = service["healthcheck"]
        if name in ONCE:
            assert check == {"disable": True}
            continue
        how, tool, *_ = check["test"]
        assert how == "CMD", f"{name}: a shell may be missing"
        tools = {"streamgr"} if name in OURS else TOOLS[service["image"].split(":")[0]]
        assert tool in tools, name
        assert set(check) == {"test", "interval", "timeout", "retries", "start_period"}, name


def test_what_watches_does_not_reach_the_broker(services: dict[str, Json]) -> None:
    assert services["kafka"]["networks"] == ["stream"]
    assert services["prometheus"]["networks"] == services["grafana"]["networks"] == ["watch"]


def test_every_variable_and_every_command_is_one_that_streamgr_knows(services: dict[str, Json], folder: Path) -> None:
    for name in OURS:
        site = folder / read(folder / "compose.yaml")["configs"]["site"]["file"]
        config, origin = load([site], variables(services[name]))
        assert config.kafka.bootstrap == "kafka:19092"
        assert config.telemetry.host == "0.0.0.0", "or nobody could scrape it"
        set_here = {v for v in origin.values() if v.startswith("$")}
        assert set_here == {f"${v}" for v in variables(services[name]) if "__" in v}
        assert cli._parser().parse_args(services[name]["command"])
    assert load([site], variables(services["scorer"]))[0].scorer.host == "0.0.0.0"
    assert load([site], variables(services["monitor"]))[0].monitor.host == "0.0.0.0"


def test_the_site_of_the_laptop_suits_the_simulated_users_and_the_stop_budgets(
    services: dict[str, Json], repository: Path
) -> None:
    config, _ = load([repository / "config" / "compose.toml"], {})
    assert config.sequence.attribution_window_seconds > config.feed.act_within_seconds
    assert config.sequence.heartbeat_seconds > 0
    assert config.state.directory == "state", "that is the container's matter"
    grace = {name: int(services[name]["stop_grace_period"].removesuffix("s")) for name in OURS - ONCE}
    assert grace["sequencer"] > config.sequence.drain_seconds + 5
    assert grace["trainer"] > 60
    assert min(grace.values()) >= 20


def test_every_file_that_is_mounted_is_there(folder: Path) -> None:
    document = read(folder / "compose.yaml")
    files = [path for service in document["services"].values() for path in bound(service)]
    files += [config["file"] for config in document["configs"].values()]
    assert len(files) >= 4
    assert [path for path in files if not (folder / path).exists()] == []
    assert "secrets" not in document, "plain `docker compose up` must not want a file that no checkout has"


def test_every_volume_is_declared_and_ours_belong_to_the_user_who_writes_them(folder: Path) -> None:
    document, image = read(folder / "compose.yaml"), (folder / "Dockerfile").read_text()
    used = {
        volume.split(":")[0]
        for service in document["services"].values()
        for volume in service.get("volumes", [])
        if not volume.startswith((".", "/"))
    }
    assert used == set(document["volumes"])
    owned = re.search(r"install -d -o 10001 -g 10001 (.*)", image)
    assert owned
    for name in OURS:
        for volume in document["services"][name].get("volumes", []):
            assert volume.split(":")[1] in owned.group(1).split()


def test_prometheus_looks_for_services_it_can_reach(services: dict[str, Json], repository: Path) -> None:
    config = yaml.safe_load((repository / "config/prometheus/prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        for found in job.get("dns_sd_configs", []):
            for name in found["names"]:
                assert "watch" in services[name]["networks"]
                assert found["port"] == (9308 if name == "kafka-exporter" else Config().telemetry.port)


def test_the_dockerfile_is_for_any_builder_and_its_images_do_not_run_as_root(folder: Path) -> None:
    text = (folder / "Dockerfile").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert "--mount" not in code
    assert "<<" not in code
    assert re.search(r"^ARG PYTHON=3\.11-slim-bookworm$", code, re.MULTILINE)
    for stage in ("stream", "monitor", "cpu", "gpu"):
        body = re.split(r"^FROM ", code.split(f"FROM runtime AS {stage}\n")[1], flags=re.MULTILINE)[0]
        assert (re.findall(r"^USER (\S+)", body, re.MULTILINE) or ["10001:10001"])[-1] == "10001:10001"
    assert "torch" not in re.split(r"^FROM venv AS torch-cpu", code, flags=re.MULTILINE)[0]


def test_the_context_of_the_build_holds_what_is_copied_and_no_secret(folder: Path, repository: Path) -> None:
    lines = (repository / ".dockerignore").read_text().split()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == let_in
    assert not any("secret" in name for name in let_in)
    assert "/compose/secrets/" in (repository / ".gitignore").read_text().split()


def test_compose_in_the_root_finds_its_file(repository: Path) -> None:
    settings = dict(line.split("=", 1) for line in (repository / ".env").read_text().splitlines() if line)
    assert (repository / settings["COMPOSE_FILE"]).is_file()


def test_an_external_kafka_reaches_every_role_with_its_secrets(folder: Path, tmp_path: Path) -> None:
    base = read(folder / "compose.yaml")["services"]
    document = read(folder / "external.yaml", **OVERRIDES["external.yaml"])
    services = document["services"]
    assert {name for name, service in services.items() if service == "!reset"} == {"kafka", "kafka-exporter"}
    assert {name for name, service in services.items() if service != "!reset"} == OURS
    assert {n for n, s in base.items() if "kafka" in s.get("depends_on", {})} == {"topics", "kafka-exporter"}
    assert services["topics"]["depends_on"] == "!reset"
    for name in OURS:
        assert set(services[name]["secrets"]) == set(document["secrets"])
        environ = variables(base[name]) | variables(services[name])
        secret = tmp_path / "secret"
        secret.write_text("hush\n")
        assert environ["STREAMGR_KAFKA__SASL_PASSWORD_FILE"] == "/run/secrets/kafka_password"
        config, _ = load([], environ | {"STREAMGR_KAFKA__SASL_PASSWORD_FILE": str(secret)})
        assert config.kafka.bootstrap == "broker:9093"
        assert config.kafka.sasl_password == "hush"
        assert config.kafka.librdkafka == {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": "somebody",
            "ssl.ca.location": "/run/secrets/kafka_ca",
        }


def test_the_gpu_is_the_trainers_and_its_compiled_kernels_outlive_it(folder: Path) -> None:
    base, services = read(folder / "compose.yaml")["services"], read(folder / "gpu.yaml")["services"]
    assert set(services) == {"trainer", "scorer"}
    assert services["trainer"]["build"]["target"] == "gpu"
    assert services["scorer"]["build"]["target"] == "cpu", "the trainer no longer builds it"
    environ = variables(base["trainer"]) | variables(services["trainer"])
    assert load([], environ)[0].trainer.device == "cuda"
    kept = base["trainer"]["volumes"][0].split(":")[1]
    assert all(environ[name].startswith(kept) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"))


@pytest.mark.parametrize("override", ["", *OVERRIDES])
def test_compose_itself_reads_every_combination(folder: Path, override: str) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose on this machine")
    files = ["-f", "compose.yaml"] + (["-f", override] if override else [])
    done = subprocess.run(
        [docker, "compose", *files, "--profile", "demo", "config", "--quiet"],
        cwd=folder,
        env={"PATH": "/usr/bin:/usr/local/bin:/bin", "HOME": str(Path.home())} | OVERRIDES.get(override, {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
