"""A certificate authority of a test's own, by openssl."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Authority:
    """`ca`: the PEM file that clients trust."""

    directory: Path
    name: str = "ca"

    @classmethod
    def made(cls, directory: Path, name: str = "ca") -> "Authority":
        if not shutil.which("openssl"):
            pytest.skip("needs openssl")
        authority = cls(directory, name)
        _openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-keyout", str(authority._key), "-out", str(authority.ca)),
        )
        return authority

    @property
    def ca(self) -> Path:
        return self.directory / f"{self.name}.pem"

    @property
    def _key(self) -> Path:
        return self.directory / f"{self.name}.key"

    def certify(self, name: str) -> tuple[Path, Path]:
        """(certificate, key) of a server on 127.0.0.1."""
        key, request, certificate, names = (self.directory / f"{name}.{end}" for end in ("key", "csr", "pem", "san"))
        names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        _openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", str(key), "-out", str(request)),
        )
        _openssl(
            *("x509", "-req", "-in", str(request), "-days", "2", "-CA", str(self.ca), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-extfile", str(names), "-out", str(certificate)),
        )
        return certificate, key


def _openssl(*argv: str) -> None:
    done = subprocess.run(["openssl", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
