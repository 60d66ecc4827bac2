"""Ids: what is allowed, that no two meet, and the hashes that data in both stores depend on."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from functools import reduce
from operator import and_, or_
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.errors import InvalidRequest, TooLarge
from buffer.model.ids import (
    MAX_ID_CHARACTERS,
    check_id,
    conversation_key,
    derive_item_id,
    id_digest,
    make_conversation_id,
    make_item_id,
    shard_of,
    uuid7_hex,
)

from .strategies import few_ids, ids

CONTROL_CHARACTERS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
SURROGATES = [chr(code) for code in (0xD800, 0xDBFF, 0xDC00, 0xDFFF)]
ALLOWED = [
    "a",
    " ",
    "...",
    ".a",
    "a.",
    "m-91",
    "user@example.com",
    "a:b|c\\d%2F",
    "'; drop table items --",
    "{tag}*?[x]",
    "租户",
    "😀",
    "\u00a0",
    "\u200b\u202e\ufeff",
    "\ue000\uffff",
    "\U0010ffff",
    "é",
    "e\u0301",
]


@given(ids)
def test_every_other_character_is_allowed_and_kept(value: str) -> None:
    """An id of 1 to 200 allowed characters comes back as it is, character for character."""
    assert check_id(value, "id") == value


@pytest.mark.parametrize("value", ALLOWED)
def test_ids_that_look_dangerous_are_allowed(value: str) -> None:
    """Quotes, wildcards, dots within, invisible and private characters are ordinary ones."""
    assert check_id(value, "id") == value


@pytest.mark.parametrize("character", [*CONTROL_CHARACTERS, "/", *SURROGATES], ids=ascii)
def test_forbidden_characters_are_refused_wherever_they_stand(character: str) -> None:
    """Control characters, the separator and surrogates: at the start, in the middle, at the end, alone."""
    for value in (character, character + "a", "a" + character, "a" + character + "b", "a" * 199 + character):
        with pytest.raises(InvalidRequest, match="must not") as caught:
            check_id(value, "items[3].id")
        assert caught.value.param == "items[3].id"
        assert "items[3].id" in str(caught.value)


@given(st.text(st.characters(categories=["Cc", "Cs"]) | st.just("/"), min_size=1, max_size=200))
def test_nothing_of_the_forbidden_kinds_gets_through(value: str) -> None:
    """Unicode's own list of control characters and surrogates is the one that is refused."""
    with pytest.raises(InvalidRequest):
        check_id(value, "id")


@pytest.mark.parametrize("value", ["", ".", ".."])
def test_empty_and_dot_ids_are_refused(value: str) -> None:
    """Paths of URLs and files would lose them."""
    with pytest.raises(InvalidRequest, match=r"user must not be empty, '\.' or '\.\.'"):
        check_id(value, "user")


@pytest.mark.parametrize("value", [None, 7, 7.5, b"a", True, ["a"], {"a": 1}], ids=repr)
def test_an_id_that_is_no_string_is_refused_with_its_type(value: object) -> None:
    """Nothing is turned into a string on the way: 7 and "7" would meet."""
    with pytest.raises(InvalidRequest, match=rf"id must be a string, not {type(value).__name__}"):
        check_id(value, "id")


def test_the_length_limit_counts_characters_and_is_named() -> None:
    """200 characters of four bytes each are allowed; one more is refused with the limit and the length."""
    assert len(check_id("😀" * MAX_ID_CHARACTERS, "id").encode()) == 800
    with pytest.raises(TooLarge, match="id has 201 characters; the limit is 200") as caught:
        check_id("😀" * (MAX_ID_CHARACTERS + 1), "id")
    assert caught.value.param == "id"


@given(st.tuples(ids, ids), st.tuples(ids, ids))
def test_two_conversations_never_share_a_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Joining tenant and conversation is unambiguous, and can be undone."""
    assert tuple(conversation_key(*one).split("/")) == one
    assert (conversation_key(*one) == conversation_key(*other)) == (one == other)


@given(*[st.tuples(few_ids, few_ids, few_ids)] * 2)
def test_two_items_never_share_a_digest(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """The idempotency window tells items apart by tenant, conversation and id, however these are split."""
    digests = [
        id_digest(conversation_key(tenant, conversation), item) for tenant, conversation, item in (one, other)
    ]
    assert {len(digest) for digest in digests} == {16}
    assert (digests[0] == digests[1]) == (one == other)


@pytest.mark.parametrize(
    ("item", "prefix"),
    [
        ({"type": "message", "role": "user"}, "msg_"),
        ({"role": "user", "content": "hi"}, "msg_"),
        ({"type": None, "role": "user"}, "msg_"),
        ({"type": "function_call"}, "fc_"),
        ({"type": "function_call", "role": "assistant"}, "fc_"),
        ({"type": "function_call_output"}, "fco_"),
        ({"type": "reasoning"}, "rs_"),
        ({"type": "web_search_call", "role": "assistant"}, "item_"),
        ({"type": ["message"]}, "item_"),
        ({"type": {"message": 1}}, "item_"),
        ({"type": 7}, "item_"),
        ({}, "item_"),
        ({"content": "hi"}, "item_"),
    ],
    ids=str,
)
def test_made_item_ids_carry_the_prefix_of_their_type(item: dict[str, object], prefix: str) -> None:
    """OpenAI's prefix and 32 hex digits; whatever the type holds, an id is made and allowed."""
    made = make_item_id(item)
    assert re.fullmatch(rf"{prefix}[0-9a-f]{{32}}", made)
    assert check_id(made, "id") == made


def test_made_conversation_ids_are_allowed_and_prefixed() -> None:
    """``conv_`` and 32 hex digits."""
    assert re.fullmatch(r"conv_[0-9a-f]{32}", check_id(make_conversation_id(), "conversation"))


def test_made_ids_are_uuids_of_version_7_and_of_now() -> None:
    """RFC 9562: 48 bits of Unix milliseconds, version 7, variant 10, and the rest differs each time."""
    before = time.time_ns() // 1_000_000
    made = [UUID(uuid7_hex()) for _ in range(1_000)]
    after = time.time_ns() // 1_000_000
    assert {(uuid.version, uuid.variant) for uuid in made} == {(7, RFC_4122)}
    assert all(before <= uuid.int >> 80 <= after for uuid in made)
    # In a thousand ids each of the 74 random bits was seen as 0 and as 1.
    random_bits = (0xFFF << 64) | ((1 << 62) - 1)
    seen = [uuid.int & random_bits for uuid in made]
    assert reduce(or_, seen) == random_bits
    assert reduce(and_, seen) == 0
    assert len(set(seen)) == 1_000
    # No two of them are one bit twice: each holds its own in some id, and not its opposite in all.
    columns = [sum((bits >> bit & 1) << at for at, bits in enumerate(seen)) for bit in range(76)]
    ours = [column for bit, column in enumerate(columns) if random_bits >> bit & 1]
    assert len({min(column, column ^ ((1 << 1_000) - 1)) for column in ours}) == 74


def test_threads_make_different_ids() -> None:
    """Buffers of several event loops share what makes ids: none gets another's, or an error."""
    made: list[str] = []
    together = threading.Barrier(8)

    def make() -> None:
        together.wait()
        for _ in range(20_000):
            made.append(uuid7_hex())  # noqa: PERF401 - a plain loop lets the threads take turns

    threads = [threading.Thread(target=make) for _ in range(8)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert len({uuid[13:] for uuid in made}) == len(made) == 160_000


FORK = """
import os
from buffer.model.ids import uuid7_hex
uuid7_hex()  # whatever is fetched in advance is fetched now
child = os.fork()
made = [uuid7_hex()[13:] for _ in range(20)]
if child:
    os.waitpid(child, 0)  # so that the two do not write at the same time
print(*made, flush=True)
"""


def test_forked_processes_make_different_ids() -> None:
    """Randomness that a parent has fetched in advance is not handed out by its child as well."""
    # In a process of its own: this one may have threads, with which it must not fork.
    run = subprocess.run([sys.executable, "-c", FORK], check=True, capture_output=True, text=True)
    made = run.stdout.split()
    assert len(made) == len(set(made)) == 40


def test_derived_item_ids_never_change() -> None:
    """Importing the same file again must meet the same ids, in this release and in every later one."""
    assert derive_item_id("c7", 0) == "item_fecd67239e0d8f28f9b257ffcad25bdf"
    assert derive_item_id("c7", 1) == "item_30638348cb91e89e5362b039a936db89"
    assert derive_item_id("会話", 12) == "item_faa26007e86762783e8577cd9170f731"


@given(*[st.tuples(ids, st.integers(0, 10**6))] * 2)
def test_derived_item_ids_are_allowed_and_differ(one: tuple[str, int], other: tuple[str, int]) -> None:
    """One id for each conversation and ordinal."""
    assert check_id(derive_item_id(*one), "id")
    assert (derive_item_id(*one) == derive_item_id(*other)) == (one == other)


@pytest.mark.parametrize(
    ("key", "shards"),
    [
        ("acme/c7", [0, 0, 4, 160]),
        ("default/conv_0", [0, 2, 0, 86]),
        ("a/b", [0, 0, 2, 28]),
        ("租户/会話", [0, 3, 5, 223]),
        ("t/😀", [0, 1, 3, 249]),
    ],
)
def test_a_conversation_never_changes_its_shard(key: str, shards: list[int]) -> None:
    """Literal values: with another hash, a new release would look for unflushed items in the wrong stream."""
    assert [shard_of(key, count) for count in (1, 4, 7, 256)] == shards


@given(ids, ids, st.integers(1, 256))
def test_every_conversation_has_a_shard(tenant: str, conversation: str, count: int) -> None:
    """Always one of those that exist, and always the same one."""
    key = conversation_key(tenant, conversation)
    assert 0 <= shard_of(key, count) < count
    assert shard_of(key, count) == shard_of(key, count)


def test_conversations_spread_over_the_shards() -> None:
    """No shard of 4 gets more than a third of 2,000 conversations with consecutive names."""
    counts = [0] * 4
    for number in range(2_000):
        counts[shard_of(f"acme/conversation-{number}", 4)] += 1
    assert max(counts) < 667


def test_id_digests_never_change() -> None:
    """Literal values: a retry after an upgrade must find what the release before it remembered."""
    assert id_digest("acme/c7", "m-91").hex() == "69008757399fbcf64ed54fcc615e23f6"
    assert id_digest("租户/会話", "m-91").hex() == "4a46da3c135b34f25ab0aba29cd59cec"
