"""A running stack, held from outside as an operator holds it: `docker compose`, Prometheus, the published ports.

Everything that is done to it is also possible on Docker Desktop: no process of a container is touched from the host,
and a crash is a SIGKILL that the container's own shell sends to the role behind its PID 1 (`docker kill` would not do:
Docker takes it for an operator's wish and does not start the container again).
"""

import json
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PORTS = {"KAFKA_PORT": 9092, "SCORER_PORT": 8080, "MONITOR_PORT": 8090, "PROMETHEUS_PORT": 9090, "GRAFANA_PORT": 3000}
LOOK_SECONDS = 1.0
# every process whose parent is PID 1: the role; what `exec` started has no parent here
CRASH = (
    'for p in /proc/[0-9]*; do read -r _ _ _ parent _ <"$p/stat" || continue; '
    '[ "$parent" = 1 ] && kill -9 "${p#/proc/}"; done; true'
)
Json = dict[str, Any]


class Trouble(AssertionError):
    """The stack did not do what it must."""


@dataclass(frozen=True)
class State:
    """One container as Docker sees it."""

    running: bool
    health: str  # healthy | unhealthy | starting; "" without a check
    restarts: int  # by Docker itself, since it was last started by hand
    started: str
    exit_code: int

    @property
    def well(self) -> bool:
        return self.running and self.health in ("healthy", "")


class Stack:
    """One compose project on ports of its own: `up` to `down`."""

    def __init__(self, project: str, *, overrides: Iterable[Path] = (), port_shift: int = 0, **environ: str) -> None:
        """port_shift: added to every published port, so that two projects fit on one machine."""
        self.project = project
        self.ports = {name: port + port_shift for name, port in PORTS.items()}
        self._files = [ROOT / "compose" / "compose.yaml", *overrides]
        self._environ = {**os.environ, **{name: str(port) for name, port in self.ports.items()}, **environ}
        self.bootstrap = f"127.0.0.1:{self.ports['KAFKA_PORT']}"

    def compose(self, *arguments: str, timeout: float = 1_200.0, code: int | None = 0) -> str:
        """`docker compose …`; its stdout. Raises `Trouble` on another exit code than `code` (None: any)."""
        files = [word for file in self._files for word in ("-f", str(file))]
        return self._docker(
            "compose", "-p", self.project, *files, "--profile", "demo", *arguments, timeout=timeout, code=code
        )

    def _docker(self, *arguments: str, timeout: float = 120.0, code: int | None = 0) -> str:
        done = subprocess.run(
            ["docker", *arguments], env=self._environ, capture_output=True, text=True, timeout=timeout, check=False
        )
        if code is not None and done.returncode != code:
            raise Trouble(f"docker {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-3_000:]}")
        return done.stdout

    # -- its containers

    def services(self, without: Iterable[str] = ()) -> list[str]:
        """Everything that is to run, without those left out."""
        return sorted(set(self.compose("config", "--services").split()) - set(without))

    def container(self, service: str) -> str:
        return self.compose("ps", "-a", "-q", service).strip()

    def states(self, services: Iterable[str]) -> dict[str, State]:
        """Each service's container; one that does not exist is not running."""
        found: dict[str, State] = {}
        listed = self._docker("ps", "-a", "-q", "--filter", f"label=com.docker.compose.project={self.project}").split()
        for c in json.loads(self._docker("inspect", *listed)) if listed else []:
            state, name = c["State"], c["Config"]["Labels"]["com.docker.compose.service"]
            found[name] = State(
                running=state["Running"] and not state["Restarting"],
                health=state.get("Health", {}).get("Status", ""),
                restarts=c["RestartCount"],
                started=state["StartedAt"],
                exit_code=state["ExitCode"],
            )
        return {name: found.get(name, State(False, "", 0, "", -1)) for name in services}

    def crash(self, service: str) -> None:
        """SIGKILL to the role; its container ends, and Docker's restart policy is on its own."""
        self.compose("exec", "-T", service, "sh", "-c", CRASH, code=None)

    def cut(self, service: str, network: str) -> None:
        self._docker("network", "disconnect", f"{self.project}_{network}", self.container(service))

    def mend(self, service: str, network: str) -> None:
        """Back into the network, under its name."""
        self._docker("network", "connect", "--alias", service, f"{self.project}_{network}", self.container(service))

    # -- what an operator sees

    def get(self, port: str, path: str, body: Json | None = None, timeout: float = 5.0) -> Json | None:
        """The JSON answer of a published port; None when there is none."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[port]}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                told: Json = json.load(answer)
                return told
        except (OSError, ValueError):  # away, refused, or not ready
            return None

    def rank(self, user: str, candidates: list[str]) -> Json | None:
        return self.get("SCORER_PORT", "/v1/rank", {"user_id": user, "candidates": candidates})

    def query(self, expression: str) -> list[tuple[Mapping[str, str], float]] | None:
        """An instant query's vector; None while Prometheus is away."""
        told = self.get("PROMETHEUS_PORT", f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        if told is None or told["status"] != "success":
            return None
        return [(row["metric"], float(row["value"][1])) for row in told["data"]["result"]]

    def targets(self) -> dict[str, str]:
        """Prometheus' targets, by role (or job): up, down or unknown."""
        told = self.get("PROMETHEUS_PORT", "/api/v1/targets?state=active")
        active = told["data"]["activeTargets"] if told else []
        return {t["labels"].get("role", t["labels"]["job"]): t["health"] for t in active}

    def firing(self) -> list[Mapping[str, str]] | None:
        """The labels of every alert that fires now; None while Prometheus is away."""
        told = self.get("PROMETHEUS_PORT", "/api/v1/alerts")
        return told and [a["labels"] for a in told["data"]["alerts"] if a["state"] == "firing"]


def wait_for(what: str, condition: Callable[[], Any], seconds: float) -> float:
    """Seconds until the condition held. Raises `Trouble` naming what did not come."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise Trouble(f"waited {seconds:g} s for {what}")
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began
