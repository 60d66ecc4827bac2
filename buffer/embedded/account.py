"""Which user a Postgres server runs as, and what that user can reach.

Postgres refuses to run as root. As root it is therefore run as the owner of its data, or for new data
as `nobody`: a user that exists on every system, so that none has to be made.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buffer.errors import EmbeddedError

if TYPE_CHECKING:
    from pathlib import Path

OVERFLOW_ID = 65534
"""What `nobody` is on Linux, should the user database not name it."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user to switch to."""

    uid: int
    gid: int
    name: str

    def own(self, path: Path) -> None:
        """Give ``path``, which must be ours, to this user."""
        os.chown(path, self.uid, self.gid)

    def reaches(self, *paths: Path) -> bool:
        """Whether this user can enter or execute every path; asked of the kernel, not worked out."""
        script = 'for path in "$@"; do test -x "$path" || exit 1; done'
        command = ["/bin/sh", "-c", script, "sh", *map(str, paths)]
        try:
            done = subprocess.run(  # noqa: S603
                command, user=self.uid, group=self.gid, extra_groups=[], cwd="/", check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise EmbeddedError(
                f"Postgres does not run as root, and switching to user {self.name} failed ({error}); "
                "start this program as a normal user"
            ) from error
        return done.returncode == 0


def postgres_account(data: Path) -> Account | None:
    """The user for the Postgres data in ``data``; None for the one that we are."""
    if os.geteuid() != 0:
        return None
    owner = data.stat().st_uid if data.exists() else 0
    try:
        entry = pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
    except KeyError:
        uid = owner or OVERFLOW_ID
        return Account(uid, uid, str(uid))
    # macOS counts nobody's ids from -2.
    return Account(entry.pw_uid & 0xFFFFFFFF, entry.pw_gid & 0xFFFFFFFF, entry.pw_name)
