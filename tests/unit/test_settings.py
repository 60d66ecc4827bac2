"""Settings: where they come from, which one wins, and errors that name the setting and no secret."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from buffer.errors import SettingsError
from buffer.settings import Settings, without_secrets

SECRET = "hunter2-correct-horse"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("BUFFER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def refused(**overrides: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        Settings.load(**overrides)
    return caught.value


# --- sources


def test_defaults_are_those_of_the_contract() -> None:
    """With nothing set, the figures that the contract names hold."""
    settings = Settings.load()
    assert settings.flush_interval_seconds == 0.5
    assert settings.idempotency_window_seconds == 600
    assert settings.max_item_bytes == 1 << 20
    assert settings.max_batch_bytes == 4 << 20
    assert settings.host == "127.0.0.1"


def test_the_environment_counts_with_its_prefix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """``BUFFER_SHARDS`` is ours, ``SHARDS`` is somebody else's."""
    monkeypatch.setenv("SHARDS", "9")
    monkeypatch.setenv("REDIS_URL", "redis://other:1/1")
    assert Settings.load().shards == Settings().shards == 4
    monkeypatch.setenv("BUFFER_SHARDS", "16")
    monkeypatch.setenv("BUFFER_REDIS_URL", "redis://ours:6380/2")
    settings = Settings.load()
    assert (settings.shards, settings.redis_url) == (16, "redis://ours:6380/2")


def test_arguments_win_over_environment_over_dotenv_over_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four sources of one setting, taken away one by one from the strongest."""
    config = tmp_path / "buffer.toml"
    config.write_text('shards = 5\nkey_prefix = "from-config"\nflush_interval_seconds = 2.5\n')
    Path(".env").write_text("BUFFER_SHARDS=6\nBUFFER_KEY_PREFIX=from-dotenv\n")
    monkeypatch.setenv("BUFFER_SHARDS", "7")
    settings = Settings.load(config, shards=8)
    assert (settings.shards, settings.key_prefix, settings.flush_interval_seconds) == (8, "from-dotenv", 2.5)
    assert Settings.load(config).shards == 7
    monkeypatch.delenv("BUFFER_SHARDS")
    assert Settings.load(config).shards == 6
    Path(".env").unlink()
    assert (Settings.load(config).shards, Settings.load(config).key_prefix) == (5, "from-config")
    assert Settings.load().shards == 4


def test_a_config_file_serves_one_load_only(tmp_path: Path) -> None:
    """Loading with a file leaves nothing behind for the next load without one."""
    config = tmp_path / "buffer.toml"
    config.write_text("shards = 5")
    assert isinstance(Settings.load(config), Settings)
    assert Settings.load().shards == 4


def test_settings_cannot_be_changed_after_the_start() -> None:
    """Everything needs a restart to change, and nothing can pretend otherwise."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().shards = 5  # type: ignore[misc]


# --- errors


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("shards", "0", "greater than or equal to 1"),
        ("shards", "257", "less than or equal to 256"),
        ("shards", "many", "valid integer"),
        ("metrics_port", "65536", "less than or equal to 65535"),
        ("append_timeout_seconds", "0", "greater than 0"),
        ("idempotency_window_seconds", "0.5", "greater than or equal to 1"),
        ("max_item_bytes", "1023", "greater than or equal to 1024"),
        ("max_batch_items", "701", "less than or equal to 700"),
        ("lease_seconds", "0.2", "greater than or equal to 0.3"),
        ("postgres_pooled", "perhaps", "valid boolean"),
        ("key_prefix", "a{b}", "match pattern"),
        ("key_prefix", "", "match pattern"),
        ("redis_url", "127.0.0.1:6379", "must be a URL"),
        ("summarizer", "magic", "'none', 'extractive' or 'openai'"),
        ("summary_max_bytes", "511", "greater than or equal to 512"),
    ],
)
def test_an_error_names_the_variable_and_its_limit(
    name: str, value: str, rule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From each source the same message: the variable to set, the rule, and the value if it is harmless."""
    variable = f"BUFFER_{name.upper()}"
    config = tmp_path / "buffer.toml"
    config.write_text(f'{name} = "{value}"')
    with pytest.raises(SettingsError, match=f"^{variable}: .*{rule}"):
        Settings.load(config)
    config.unlink()
    assert rule in str(refused(**{name: value}))
    Path(".env").write_text(f"{variable}={value}\n")
    assert str(refused()).startswith(f"{variable}: ")
    Path(".env").unlink()
    monkeypatch.setenv(variable, value)
    error = str(refused())
    assert error.startswith(f"{variable}: ")
    assert rule in error
    assert (f"got {value!r}" in error) == (name != "redis_url")


def test_every_wrong_setting_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, so that mending them takes one restart."""
    monkeypatch.setenv("BUFFER_SHARDS", "0")
    monkeypatch.setenv("BUFFER_MAX_ITEM_BYTES", "big")
    lines = str(refused(lease_seconds=0)).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [
        "BUFFER_LEASE_SECONDS",
        "BUFFER_MAX_ITEM_BYTES",
        "BUFFER_SHARDS",
    ]


@pytest.mark.parametrize("text", [b"shards = ", b"shards = 1\nshards = 2", b"\xff\xfe"], ids=repr)
def test_a_config_file_that_cannot_be_read_is_a_settings_error(text: bytes, tmp_path: Path) -> None:
    """Bad TOML, a doubled key, another encoding: one kind of error to catch."""
    config = tmp_path / "buffer.toml"
    config.write_bytes(text)
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.load(config)


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A mistyped path is an error, not a start with defaults."""
    with pytest.raises(SettingsError, match=r"config file .*missing\.toml does not exist"):
        Settings.load(tmp_path / "missing.toml")


# --- secrets


URLS_WITH_SECRETS = [
    f"redis://:{SECRET}@cache.example:6379/0",
    f"rediss://user:{SECRET}@cache.example:6379/0",
    f"redis://{SECRET}@cache.example",
    f"redis://cache.example:6379/0?password={SECRET}",
    f"unix://user:{SECRET}@/run/valkey.sock?db=1&password={SECRET}",
    f"redis+sentinel://:{SECRET}@one:26379,two:26379/main/0",
    f"postgresql://user:{SECRET}@db.example:5432/buffer",
    f"postgresql://user:{SECRET}@one:5432,two:5432/buffer?password={SECRET}",
    f"postgresql:///buffer?host=/run/postgresql&password={SECRET}@more",
]
BROKEN_URLS_WITH_SECRETS = [
    SECRET,
    f"host=db.example password={SECRET}",
    f"user:{SECRET}",
    f"redis://cache.example:{SECRET}",
    f"redis://:{SECRET}/more@cache.example:6379/0",
    f"redis://:{SECRET}#more@cache.example:6379/0",
    f"redis://:1/{SECRET}@cache.example:6379/0",
    f"redis://:{SECRET}?more@cache.example",
    f"redis://[{SECRET}@cache.example",
    f"postgresql://user:{SECRET}@db.example:{SECRET}/buffer",
]


def everything_printed(error: BaseException) -> str:
    """The error as logs and tracebacks show it, with all that it was raised from."""
    return "".join([str(error), repr(error), *traceback.format_exception(error)])


@pytest.mark.parametrize("url", URLS_WITH_SECRETS)
def test_printed_settings_hold_no_password(url: str) -> None:
    """``repr`` and ``str`` show where a URL leads; the setting itself keeps its password."""
    settings = Settings.load(redis_url=url, postgres_url=url)
    assert settings.redis_url == settings.postgres_url == url
    for text in (repr(settings), str(settings), f"{settings}", repr([settings])):
        assert SECRET not in text
        assert "more" not in text
        assert text.count("***") >= 2
    assert url.partition(":")[0] + "://" in repr(settings)


@pytest.mark.parametrize("url", BROKEN_URLS_WITH_SECRETS)
@pytest.mark.parametrize("name", ["redis_url", "postgres_url"])
def test_a_broken_url_is_refused_without_being_quoted(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password with a "/" or "#" breaks its URL; the error says what to do, and nothing of the password."""
    monkeypatch.setenv(f"BUFFER_{name.upper()}", url)
    error = refused()
    assert f"BUFFER_{name.upper()}: " in str(error)
    assert "%2F" in str(error)
    assert SECRET not in everything_printed(error)


@pytest.mark.parametrize("url", [*URLS_WITH_SECRETS, *BROKEN_URLS_WITH_SECRETS])
@pytest.mark.parametrize(
    "wrap", [lambda url: [url], lambda url: {"url": url}, str.encode], ids=["list", "dict", "bytes"]
)
def test_a_url_of_the_wrong_type_is_not_quoted(wrap: Any, url: str) -> None:
    """A TOML list or table where a URL belongs is refused, and not shown."""
    with pytest.raises(SettingsError) as caught:
        Settings.load(redis_url=wrap(url), shards=0)
    assert SECRET not in everything_printed(caught.value)


@pytest.mark.parametrize("name", ["key_prefix", "shards", "postgres_pooled", "flush_interval_seconds"])
def test_a_url_in_the_place_of_another_setting_is_not_quoted_whole(name: str) -> None:
    """Two variables mixed up must not put a password into a log."""
    error = refused(**{name: f"redis://:{SECRET}@cache.example:6379/0"})
    assert "redis://***@cache.example:6379/0" in str(error)
    assert SECRET not in everything_printed(error)


def test_another_wrong_setting_does_not_bring_out_a_right_url() -> None:
    """Errors quote what is wrong, not the other settings beside it."""
    error = refused(postgres_url=f"postgresql://u:{SECRET}@db/buffer", shards=0)
    assert SECRET not in everything_printed(error)


# --- the summarizer


def test_a_model_is_needed_with_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at the start, by the name of the variable that is missing."""
    monkeypatch.setenv("BUFFER_SUMMARIZER", "openai")
    assert str(refused()).startswith("BUFFER_SUMMARIZER_MODEL: ")
    monkeypatch.setenv("BUFFER_SUMMARIZER_MODEL", "m-1")
    assert Settings.load().summarizer_model == "m-1"


@pytest.mark.parametrize("name", ["repr", "str", "dump", "error"])
def test_a_key_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not by the settings, and not by an error about itself or another setting."""
    monkeypatch.setenv("BUFFER_SUMMARIZER_API_KEY", f" {SECRET}\n")
    settings = Settings.load()
    assert settings.summarizer_api_key.get_secret_value() == SECRET
    assert Settings.load(**settings.model_dump()) == settings
    shown = {
        "repr": lambda: repr(settings),
        "str": lambda: f"{settings}",
        "dump": lambda: repr(settings.model_dump()),
        "error": lambda: everything_printed(refused(shards=0)),
    }
    assert SECRET not in shown[name]()


@pytest.mark.parametrize("key", [f"{SECRET}\nX-Header: 1", f"{SECRET}\xe9", f"{SECRET} more", [SECRET]])
def test_a_key_that_fits_no_header_is_refused_without_being_quoted(key: Any) -> None:
    """The HTTP client would quote it."""
    error = refused(summarizer_api_key=key)
    assert str(error).startswith("BUFFER_SUMMARIZER_API_KEY: ")
    assert SECRET not in everything_printed(error)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@api.example/v1",
        f"https://{SECRET}@api.example/v1",
        f"https://api.example/v1?key={SECRET}",
        f"https://api.example/v1#{SECRET}",
        SECRET,
    ],
)
def test_an_endpoint_with_a_secret_in_its_url_is_refused(url: str) -> None:
    """The client logs the URL of each request."""
    error = refused(summarizer_base_url=url)
    assert str(error).startswith("BUFFER_SUMMARIZER_BASE_URL: ")
    assert SECRET not in everything_printed(error)


@pytest.mark.parametrize("url", ["ftp://api.example/v1", "https:///v1", "api.example/v1", ""])
def test_an_endpoint_is_an_http_url(url: str) -> None:
    """Found at the start, not at the first summary."""
    assert "must be an http:// or https:// URL" in str(refused(summarizer_base_url=url))


def test_a_final_slash_of_an_endpoint_does_not_matter() -> None:
    """``/v1/`` and ``/v1`` are the same."""
    assert Settings.load(summarizer_base_url="http://[::1]:11434/v1/").summarizer_base_url.endswith("/v1")


@given(st.text(), st.text(st.characters(exclude_characters="/#?@", exclude_categories=["Cs"]), min_size=1))
def test_no_text_brings_out_a_password(before: str, password: str) -> None:
    """Whatever surrounds it: what is not a correct URL is not shown at all."""
    marked = f"SECRET{password}SECRET"
    texts = [f"redis://{before}:{marked}@host", f"redis://:{marked}@host/{before}"]
    if "://" not in before:
        texts += [before + marked, marked + before]
    for text in texts:
        assert "SECRET" not in without_secrets(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://u:p@[::1]:6379/0", "redis://***@[::1]:6379/0"),
        ("unix:///run/a@b.sock?db=1", "unix:///run/a@b.sock?***"),
        ("postgresql://postgres@127.0.0.1:5432/buffer", "postgresql://***@127.0.0.1:5432/buffer"),
        ("postgresql://u:a@b@h:5432/db?sslmode=require", "postgresql://***@h:5432/db?***"),
        ("postgresql://u@:5432/db", "postgresql://***@:5432/db"),
        ("nonsense", "***"),
        ("", "***"),
    ],
)
def test_what_is_shown_of_a_url_is_where_it_leads(url: str, shown: str) -> None:
    """Scheme, hosts, ports and database: enough to see what is wrong."""
    assert without_secrets(url) == shown
