"""The Lua scripts, one operation a file; each file's header gives its keys, arguments and reply."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(slots=True, frozen=True)
class Script:
    """A script's text and the SHA-1 under which Redis keeps it."""

    name: str
    source: bytes
    sha: bytes


def _load(name: str) -> Script:
    source = files(__package__).joinpath(f"{name}.lua").read_bytes()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


APPEND = _load("append")
TAIL = _load("tail")
LEASE = _load("lease")
SETTLE = _load("settle")
READ = _load("read")
CLAIM = _load("claim")
FILL = _load("fill")
PEEK = _load("peek")
GRANT = _load("grant")
ROTATE = _load("rotate")
FENCE = _load("fence")
JOIN = _load("join")
KICK = _load("kick")
REPORT = _load("report")
FOLLOW = _load("follow")
ASK = _load("ask")
PROBE = _load("probe")
