"""``buffer dlq``: items that could not be stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from cyclopts import App, Parameter

from buffer.app.runtime import open_database
from buffer.cli.common import EXIT_FAILED, Common, note, print_json, run
from buffer.errors import InvalidRequest
from buffer.store.dead_letters import DeadLetters, KeptLetter

app = App(name="dlq", help="List, show, retry or drop items that could not be stored.")

_PAGE = 500
_JSON = Parameter(negative="", help="One JSON document.")


@asynccontextmanager
async def _letters(common: Common | None) -> AsyncIterator[DeadLetters]:
    settings = (common or Common(log_level="warning")).settings()
    async with open_database(settings) as database:
        yield DeadLetters(database)


@app.command(name="list")
def list_(
    *,
    tenant: str | None = None,
    conversation: str | None = None,
    limit: Annotated[int, Parameter(help="At most this many, oldest first.")] = 100,
    json: Annotated[bool, _JSON] = False,
    common: Common | None = None,
) -> None:
    """Show which items could not be stored, and why. Payloads are shown by `dlq show`."""

    async def main() -> tuple[list[KeptLetter], int]:
        async with _letters(common) as letters:
            return await letters.page(0, limit, tenant, conversation), await letters.count()

    found, count = run(main)
    if json:
        print_json({"count": count, "dead_letters": [_document(letter) for letter in found]})
        return
    for letter in found:
        print(
            f"{letter.id:>6}  {letter.created_at:%Y-%m-%d %H:%M:%S}  "
            f"{letter.tenant}/{letter.conversation}/{letter.item_id}  {letter.reason}"
        )
    note(f"{len(found)} of {count} dead letters")


@app.command
def show(number: int, *, json: Annotated[bool, _JSON] = False, common: Common | None = None) -> None:
    """Show one, with its payload."""

    async def main() -> KeptLetter:
        async with _letters(common) as letters:
            return await letters.show(number)

    letter = run(main)
    if json:
        print_json({**_document(letter), "payload": letter.payload.decode(errors="backslashreplace")})
        return
    for name, value in _document(letter).items():
        print(f"{name:<13} {value}")
    print(letter.payload.decode(errors="backslashreplace"))


@app.command
def retry(
    *numbers: int,
    all: Annotated[bool, Parameter(name="--all", negative="", help="All of them.")] = False,  # noqa: A002
    json: Annotated[bool, _JSON] = False,
    common: Common | None = None,
) -> int:
    """Store them at their own positions, now that the reason is gone. Exits 1 if one is refused again."""

    async def act(letters: DeadLetters, number: int) -> tuple[str, str]:
        return await letters.retry(number)

    return _each(numbers, act, everything=all, json=json, common=common)


@app.command
def drop(
    *numbers: int,
    all: Annotated[bool, Parameter(name="--all", negative="", help="All of them.")] = False,  # noqa: A002
    yes: Annotated[bool, Parameter(negative="", help="Without it nothing is dropped.")] = False,
    json: Annotated[bool, _JSON] = False,
    common: Common | None = None,
) -> int:
    """Forget them and their payloads, for good."""
    if not yes:
        raise InvalidRequest("dropping is for good; say --yes", param="--yes")

    async def act(letters: DeadLetters, number: int) -> tuple[str, str]:
        await letters.drop(number)
        return "dropped", ""

    return _each(numbers, act, everything=all, json=json, common=common)


def _each(
    numbers: tuple[int, ...],
    act: Callable[[DeadLetters, int], Awaitable[tuple[str, str]]],
    *,
    everything: bool,
    json: bool,
    common: Common | None,
) -> int:
    if bool(numbers) == everything:
        raise InvalidRequest("name the numbers, or say --all", param="numbers")

    async def main() -> list[dict[str, Any]]:
        async with _letters(common) as letters:
            chosen = list(numbers) or [n async for n in _every_number(letters)]
            return [_result(number, *await act(letters, number)) for number in chosen]

    results = run(main)
    if json:
        print_json(results)
    else:
        for result in results:
            print(f"{result['id']:>6}  {result['outcome']}  {result['reason']}".rstrip())
    return EXIT_FAILED if any(result["outcome"] == "refused" for result in results) else 0


async def _every_number(letters: DeadLetters) -> AsyncIterator[int]:
    after = 0
    while page := await letters.page(after, _PAGE):
        for letter in page:
            yield letter.id
        after = page[-1].id


def _result(number: int, outcome: str, reason: str) -> dict[str, Any]:
    return {"id": number, "outcome": outcome, "reason": reason}


def _document(letter: KeptLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "tenant": letter.tenant,
        "conversation": letter.conversation,
        "item_id": letter.item_id,
        "position": str(letter.position),
        "reason": letter.reason,
        "created_at": letter.created_at,
        "bytes": len(letter.payload),
    }
