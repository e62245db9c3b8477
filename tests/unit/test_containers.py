"""The container files without containers: what they refer to is there, what they run is ours, what they set is known.

`make lint` holds them against hadolint and the compose specification; here they are held against the repository.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.settings import PREFIX, ROOT, load_settings
from model import SILENT

SECRETS = "/run/secrets/"
IMAGE_WITH_TAG = r"[\w./-]+:(?!latest)[\w.-]*\d[\w.-]*"
DOCKERFILES = {"moderato:cpu": "Dockerfile", "moderato:gpu": "Dockerfile.gpu"}
ONE_SHOT = {"roles", "migrate", "grants", "moderato"}


def interpolated(text: str) -> str:
    """As compose does where the environment sets nothing; a variable without a default fails."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


COMPOSE: dict[str, Any] = yaml.safe_load(interpolated((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] in DOCKERFILES}


def make_secrets(folder: Path) -> Path:
    """What deploy/secrets.sh makes."""
    subprocess.run(["sh", str(ROOT / "deploy" / "secrets.sh"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_secrets(tmp_path_factory.mktemp("compose") / "secrets")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Each instruction and its words, comments and line ends gone."""
    lines = [
        line for line in (ROOT / dockerfile).read_text(encoding="utf-8").splitlines() if not re.match(r"\s*#", line)
    ]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [(words[0], words[1]) for line in whole.splitlines() if len(words := line.split(maxsplit=1)) == 2]


def image_environment(dockerfile: str) -> dict[str, str]:
    words = " ".join(rest for name, rest in instructions(dockerfile) if name == "ENV")
    return dict(word.split("=", 1) for word in words.split())


def environment(service: dict[str, Any], secrets: Path) -> dict[str, str]:
    """Of a process in the service's container, its secrets where they are here."""
    found = image_environment(DOCKERFILES[service["image"]]) | service.get("environment", {})
    files = {f"{SECRETS}{name}": declared["file"] for name, declared in COMPOSE["secrets"].items()}
    return {
        name: str(secrets / Path(files[value]).name) if value.startswith(SECRETS) else value
        for name, value in found.items()
        if name.startswith(PREFIX)
    }


def commands(name: str) -> Iterator[list[str]]:
    """Everything that runs in a container of the service: its command and its health check."""
    service = OURS[name]
    image = dict(instructions(DOCKERFILES[service["image"]]))
    yield [*service.get("entrypoint", []), *service.get("command", json.loads(image["CMD"]))]
    check = service.get("healthcheck", {})
    if not check.get("disable"):
        kind, *words = check["test"] if check else ["CMD", *json.loads(image["HEALTHCHECK"].partition("CMD ")[2])]
        assert kind == "CMD"
        yield words


class TestServices:
    @pytest.mark.parametrize("name", SERVICES)
    def test_what_a_service_refers_to_is_declared(self, name: str) -> None:
        service = SERVICES[name]
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
        assert set(service["networks"]) <= COMPOSE["networks"].keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        # Each secret that the environment or a command names is given to it
        used = set(re.findall(rf"{SECRETS}(\w+)", json.dumps(service)))
        assert used <= set(service.get("secrets", []))

    def test_and_what_is_declared_is_used(self) -> None:
        for kind in ("secrets", "networks"):
            assert {each for service in SERVICES.values() for each in service.get(kind, [])} == COMPOSE[kind].keys()
        mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
        assert {each for each in mounted if not each.startswith(".")} == COMPOSE["volumes"].keys()

    @pytest.mark.parametrize("name", SERVICES)
    def test_what_a_service_waits_for_comes(self, name: str) -> None:
        waits_for = SERVICES[name].get("depends_on", {})
        for other in waits_for:
            # It starts whenever this one does
            assert set(SERVICES[other].get("profiles", [])) in (set(), set(SERVICES[name].get("profiles", [])))
            kind = waits_for[other]["condition"] if isinstance(waits_for, dict) else "service_started"
            if kind == "service_completed_successfully":
                assert other in ONE_SHOT
                assert SERVICES[other]["restart"].startswith("on-failure")  # else it would begin anew for ever
            if kind == "service_healthy":
                assert SERVICES[other]["healthcheck"]["test"]

    @pytest.mark.parametrize("name", SERVICES)
    def test_no_service_has_more_rights_than_it_needs(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["logging"]["options"]["max-size"]
        # The monitoring images have a user of their own; the servers' would begin as root
        assert service.get("user", "root") != "root" or name in ("prometheus", "grafana")
        # Ports are this machine's alone
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        if name not in ONE_SHOT | {"webhooks"}:
            assert service["deploy"]["resources"]["limits"]["memory"]

    def test_images_are_pinned_by_a_tag(self) -> None:
        for service in SERVICES.values():
            assert service["image"] in DOCKERFILES or re.fullmatch(IMAGE_WITH_TAG, service["image"]), service["image"]
            if "build" in service:
                assert DOCKERFILES[service["image"]] == service["build"]["dockerfile"]
        for dockerfile in DOCKERFILES.values():
            text = (ROOT / dockerfile).read_text(encoding="utf-8")
            default = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
            for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
                assert re.fullmatch(IMAGE_WITH_TAG, image.replace("${PYTHON_TAG}", default["PYTHON_TAG"])), image

    def test_workers_only_read_versions_and_the_trainer_writes_them(self) -> None:
        mounts = {
            name: volume
            for name, service in OURS.items()
            for volume in service.get("volumes", [])
            if volume.startswith("versions:")
        }
        directory = image_environment("Dockerfile")["MODERATO_VERSIONS_DIR"]
        assert {name for name, mount in mounts.items() if mount == f"versions:{directory}:ro"} == {
            "worker",
            "worker-gpu",
        }
        assert {name for name, mount in mounts.items() if mount == f"versions:{directory}"} >= {
            "trainer",
            "trainer-gpu",
        }

    @pytest.mark.parametrize("name", ["worker", "worker-gpu"])
    def test_a_worker_has_longer_to_stop_than_a_lease_lasts(self, name: str) -> None:
        # After that what it holds would be another's in any case
        grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s > load_settings({}).worker.visibility_timeout_s


class TestSilence:
    @pytest.mark.parametrize("dockerfile", DOCKERFILES.values())
    def test_libraries_in_an_image_send_nothing(self, dockerfile: str) -> None:
        told = image_environment(dockerfile)
        assert {name: told.get(name) for name in SILENT} == SILENT

    def test_grafana_neither_reports_nor_asks(self) -> None:
        silent = {
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
            "GF_NEWS_NEWS_FEED_ENABLED": "false",
            "GF_PLUGINS_PREINSTALL_DISABLED": "true",
            "GF_PLUGINS_PUBLIC_KEY_RETRIEVAL_DISABLED": "true",
            "GF_SECURITY_DISABLE_GRAVATAR": "true",
        }
        assert silent.items() <= SERVICES["grafana"]["environment"].items()


class TestMonitoring:
    def test_prometheus_asks_every_process_under_the_name_that_the_alerts_know(self) -> None:
        def jobs(file: str) -> dict[str, Any]:
            config = yaml.safe_load((ROOT / "deploy" / file / "prometheus.yml").read_text(encoding="utf-8"))
            assert config["rule_files"] == ["alerts.yml"]
            return {job["job_name"]: job for job in config["scrape_configs"]}

        composed = jobs("compose")
        assert composed.keys() == jobs("prometheus").keys()
        metrics = load_settings(image_environment("Dockerfile")).metrics
        parts = {
            "worker": ({"worker", "worker-gpu"}, metrics.worker_port),
            "trainer": ({"trainer", "trainer-gpu"}, metrics.trainer_port),
            "webhooks": ({"webhooks"}, metrics.webhooks_port),
        }
        for part, (names, port) in parts.items():
            [found] = composed[f"moderato-{part}"]["dns_sd_configs"]
            assert (set(found["names"]), found["port"]) == (names, port)
            assert names <= OURS.keys()

    def test_grafana_finds_prometheus_and_the_dashboard(self) -> None:
        found = {
            kind: yaml.safe_load((ROOT / "deploy" / "compose" / f"grafana-{kind}.yml").read_text(encoding="utf-8"))
            for kind in ("datasources", "dashboards")
        }
        [source] = found["datasources"]["datasources"]
        assert source["url"] == "http://prometheus:9090"
        assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])
        [provider] = found["dashboards"]["providers"]
        mounted = {volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]}
        assert f"{provider['options']['path']}/moderato.json" in mounted
        for kind in found:
            assert f"/etc/grafana/provisioning/{kind}/moderato.yml" in mounted


class TestProcesses:
    @pytest.mark.parametrize("name", OURS)
    def test_what_is_set_is_a_setting(self, name: str, secrets: Path) -> None:
        settings = load_settings(environment(OURS[name], secrets))
        # And each comes in as the user that is made for it
        users = [f"//{user}:" in settings.broker_url for user in ("worker", "trainer", "operator", "producer")]
        assert sum(users) == ("MODERATO_BROKER_URL_FILE" in OURS[name].get("environment", {}))
        assert "@postgres:5432/moderato" in settings.database_url

    @pytest.mark.parametrize("name", OURS)
    def test_what_it_runs_is_a_command_of_ours(self, name: str, secrets: Path) -> None:
        variables = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        for program, *arguments in commands(name):
            module = {"moderato": "cli.main", "celery": "celery"}[program]
            # An unknown command, option or app fails before the help is shown
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments, "--help"],
                cwd=ROOT,
                env=variables | environment(OURS[name], secrets),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr


class TestImages:
    def test_the_two_differ_in_the_build_of_torch_alone(self) -> None:
        def shared(dockerfile: str, own: str) -> list[tuple[str, str]]:
            found = [(name, " ".join(re.sub(own, "", rest).split())) for name, rest in instructions(dockerfile)]
            return [each for each in found if each != ("ARG", "")]

        cpu = shared("Dockerfile", r'TORCH_INDEX_URL=""|&& if \[ -n .* fi|worker(?=@%h)')
        assert cpu == shared("Dockerfile.gpu", r"NVIDIA_DRIVER_CAPABILITIES=\S+|gpu(?=@%h)")

    def test_what_goes_into_them_is_what_runs(self) -> None:
        lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        rules = [line for line in lines if line and not line.startswith("#")]
        assert rules[0] == "*"
        sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
        assert all((ROOT / path).exists() for path in sent)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert set(project["tool"]["setuptools"]["packages"]) <= sent
        # And what the trainer's settings name
        trainer = load_settings({}).trainer
        for file in (*trainer.train_files, str(trainer.holdout_file)):
            assert str(Path(file).relative_to(ROOT)) in sent
        # But nothing that is secret, or of tests
        assert not sent & {"tests", "bench", "secrets", "var", ".git"}


class TestSecrets:
    def test_each_is_made_and_no_password_twice(self, secrets: Path) -> None:
        made = {path.name: path.read_text(encoding="utf-8") for path in secrets.iterdir()}
        assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} <= made.keys()
        assert "PASSWORD " not in made["redis_users.acl"]
        # Nobody comes in as default; but as default Redis 7 reads its append-only file back, and passes over each
        # transaction that it may not do
        assert made["redis_users.acl"].startswith("user default off resetpass allkeys allchannels +@all\n")
        passwords = re.findall(r"[0-9a-f]{48}", "".join(made[name] for name in made if "url" not in name))
        assert len(set(passwords)) == len(passwords) == 4 + 6 + 2

    def test_only_their_owner_can_come_to_them_and_a_containers_user_can_read_them(self, secrets: Path) -> None:
        assert secrets.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o444}

    def test_they_are_made_once(self, secrets: Path) -> None:
        before = (secrets / "postgres_password").read_text()
        again = subprocess.run(
            ["sh", str(ROOT / "deploy" / "secrets.sh"), str(secrets)], capture_output=True, check=False
        )
        assert again.returncode == 1
        assert b"is left as it is" in again.stderr
        assert (secrets / "postgres_password").read_text() == before
