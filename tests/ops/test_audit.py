"""A known vulnerability fails, an accepted one does not, and what nobody could judge is never called sound."""

import subprocess
from typing import Any

import pytest

from tests.ops import audit

FOUND = {"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.0"]}


def report(*packages: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": list(packages), "fixes": []}


SOUND = {"name": "a", "version": "1.0", "vulns": []}
BAD = {"name": "b", "version": "1.0", "vulns": [FOUND]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1.0)"}


@pytest.mark.parametrize(
    ("reports", "accepted", "code", "says"),
    [
        ({"osv": report(SOUND)}, {}, 0, "1 packages judged by osv"),
        ({"osv": report(SOUND, BAD)}, {}, 1, "VULNERABLE: b 1.0: PYSEC-1, fixed in 2.0"),
        ({"osv": report(BAD)}, {"CVE-2026-1": "not called"}, 0, "accepted: not called"),
        ({"pypi": report(SOUND, UNKNOWN)}, {}, 0, "not judged: c"),
        ({"pypi": report(BAD, UNKNOWN)}, {}, 1, "VULNERABLE"),
        ({"osv": report(UNKNOWN), "pypi": report(UNKNOWN)}, {}, 0, "NOT DONE"),
        ({}, {}, 0, "NOT DONE"),
    ],
)
def test_the_verdict(
    reports: dict[str, Any],
    accepted: dict[str, str],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(audit, "ask", lambda service, constraints: reports.get(service))
    monkeypatch.setattr(audit, "ACCEPTED", accepted)
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    assert audit.main([]) == code
    told = capsys.readouterr()
    assert says in told.out + told.err


def test_what_does_not_fit_together_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert audit.main([]) == 1
