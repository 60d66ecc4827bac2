"""A short place for temporary files: pytest's own paths are too long for sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import support


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp")).resolve()
    path.chmod(0o711)
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    support.wait_for(lambda: not support.processes(path))  # a keeper may still be removing files
    shutil.rmtree(path)
