"""The dependencies against the public advisories: `python -m tests.ops.audit [CONSTRAINTS]`, part of `make check`.

Always: what is installed fits together. Then pip-audit asks OSV, else PyPI, about every pinned version. A known
vulnerability fails. Where nobody can be asked, or who is asked knows nothing of a package (a mirror answers "no
vulnerabilities" to everything), that is said aloud and is no failure: a machine without a network must be able to check
the rest. An advisory that does not touch us is accepted below, with the reason.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

ACCEPTED: dict[str, str] = {}  # advisory: why it does not touch us
SERVICES = ("osv", "pypi")
SECONDS = 120.0


@dataclass
class Verdict:
    """judged, unknown: packages; vulnerable: one line a finding."""

    judged: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    vulnerable: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)


def read(report: dict[str, Any], accepted: dict[str, str]) -> Verdict:
    """What pip-audit's JSON says."""
    verdict = Verdict()
    for package in report["dependencies"]:
        if "skip_reason" in package:
            verdict.unknown.append(package["name"])
            continue
        verdict.judged.append(package["name"])
        for found in package["vulns"]:
            names = {found["id"], *found.get("aliases", [])}
            fixed = ", ".join(found.get("fix_versions", [])) or "no version yet"
            line = f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}"
            if why := next((accepted[name] for name in sorted(names) if name in accepted), ""):
                verdict.accepted.append(f"{line} (accepted: {why})")
            else:
                verdict.vulnerable.append(line)
    return verdict


def ask(service: str, constraints: str) -> dict[str, Any] | None:
    """pip-audit's report by one advisory service; None where it cannot be had."""
    argv = [sys.executable, "-m", "pip_audit", "-r", constraints, "--no-deps", "--disable-pip", "-s", service]
    argv += ["-f", "json", "--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=SECONDS)
        report: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return report


def main(argv: list[str]) -> int:
    constraints = argv[0] if argv else "constraints.txt"
    if subprocess.run([sys.executable, "-m", "pip", "check"], check=False).returncode:
        return 1
    for service in SERVICES:
        report = ask(service, constraints)
        if report is not None and (verdict := read(report, ACCEPTED)).judged:
            break
    else:
        print(f"audit: NOT DONE: no advisory service ({', '.join(SERVICES)}) could be asked from here", file=sys.stderr)
        return 0
    print(f"audit: {len(verdict.judged)} packages judged by {service}")
    if verdict.unknown:
        print(f"audit: not known there, so not judged: {', '.join(verdict.unknown)}", file=sys.stderr)
    for line in verdict.accepted:
        print(f"audit: {line}")
    for line in verdict.vulnerable:
        print(f"audit: VULNERABLE: {line}", file=sys.stderr)
    return 1 if verdict.vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
