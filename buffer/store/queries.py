"""Named queries: ``sql/<file>.sql`` holds them, each under a line ``-- name: <query>``."""

from __future__ import annotations

from importlib.resources import files


def load(file: str) -> dict[str, str]:
    """Name to text of every query in ``sql/<file>.sql``."""
    queries: dict[str, str] = {}
    text = files(__package__).joinpath("sql", f"{file}.sql").read_text("utf-8")
    for section in text.split("-- name: ")[1:]:
        name, _, body = section.partition("\n")
        queries[name.strip()] = body.strip()
    return queries
