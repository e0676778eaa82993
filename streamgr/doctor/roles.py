"""Running roles, by what their probes say; `--url` names them."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

from streamgr import __version__
from streamgr.doctor.case import Case, fail, ok, warn
from streamgr.errors import TryAgain, UsageError
from streamgr.sanity import Finding

SECONDS = 5.0
BUILD = re.compile(r'streamgr_build_info\{role="([^"]*)",version="([^"]*)"\}')


def roles(case: Case) -> Iterator[Finding]:
    """Each is live and ready, and of our version."""
    for url in case.urls:
        base = url.rstrip("/")
        if not base.startswith(("http://", "https://")):
            raise UsageError(f"--url wants http(s)://HOST:PORT, got {url!r}")
        live, _ = _get(f"{base}/livez")
        if live != 200:
            what = f"{base} does not answer" if live == 0 else f"{base}/livez answers {live}: its loop stands still"
            yield fail("roles", what, "see its log; SIGUSR1 prints where each thread is", TryAgain.exit_code)
            continue
        ready, body = _get(f"{base}/readyz")
        if ready != 200:
            yield warn("roles", f"{base} is not ready: {_conditions(body)}", "it says what it waits for")
        else:
            yield ok("roles", f"{base} is live and ready")
        for role, runs in BUILD.findall(_get(f"{base}/metrics")[1]):
            if runs != __version__:
                yield warn("roles", f"the {role} at {base} runs {runs}, this is {__version__}", "see --upgrade-from")


def _conditions(body: str) -> str:
    try:
        return ", ".join(f"{name}: {why}" for name, why in json.loads(body).items() if why != "ok")
    except (ValueError, AttributeError):
        return body[:200]


def _get(url: str) -> tuple[int, str]:
    """(status, body); 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 (http or https: checked by the caller)
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""
