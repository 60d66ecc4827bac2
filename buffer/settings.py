"""Settings: environment variables with the prefix ``BUFFER_``, a ``.env`` file, or arguments.

Every limit has its unit in its name. Everything needs a restart to change. URLs may hold passwords, so
neither an error nor the ``repr`` of the settings shows more of one than where it leads. Keys are not shown.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from buffer.errors import SettingsError

_WITH_SECRETS = {"redis_url", "postgres_url", "summarizer_base_url"}
_SECRETS = {"summarizer_api_key"}


def without_secrets(url: str) -> str:
    """The URL without user, password and query; of what is not a URL, nothing."""
    if not _is_url(url):
        return "***"
    parts = urlsplit(url)
    _, at, hosts = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{'***@' if at else ''}{hosts}{parts.path}{'?***' if parts.query else ''}"


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        for host in url.netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{host}").port  # raises where it is not a number
    except ValueError:
        return False
    # An "@" after the host: the password holds a "/" or "#" that should have been percent-encoded.
    return "://" in text and (url.scheme == "unix" or "@" not in url.path + url.fragment)


def _shown(name: str | None, value: Any) -> Any:
    """A value as it may be printed; a URL in the wrong place is one too."""
    if name in _SECRETS:
        return "***"
    text = str(value)
    if name in _WITH_SECRETS or "://" in text:
        return without_secrets(text) if isinstance(value, str) else "***"
    return value


# One append is one script call, and those have a limit of arguments: four an item.
MOST_BATCH_ITEMS = 700


class Settings(BaseSettings):
    """All settings, with their defaults."""

    model_config = SettingsConfigDict(
        env_prefix="BUFFER_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="`redis://`, `rediss://` or `unix://`.")
    postgres_url: str = Field(
        "postgresql://postgres@127.0.0.1:5432/buffer", description="A libpq connection URL."
    )
    key_prefix: str = Field(
        "buffer", pattern=r"^[A-Za-z0-9_.:-]{1,40}$", description="First part of every Redis key."
    )
    shards: int = Field(
        4,
        ge=1,
        le=256,
        description="Streams over which conversations are spread; kept in Postgres at the first start, "
        "another count is refused afterwards.",
    )
    host: str = Field("127.0.0.1", description="Address that the metrics port binds to.")
    metrics_port: int = Field(
        9464, ge=0, le=65535, description="Prometheus port of `buffer flusher`; 0: none."
    )

    append_timeout_seconds: float = Field(
        2.0,
        gt=0,
        description="An append that is not acked by then is an error: Unavailable or OutcomeUnknown.",
    )
    append_queue_max: int = Field(
        20_000, ge=1, description="Appends waiting for Redis in one process; over it: Overloaded."
    )
    append_queue_max_bytes: int = Field(64 << 20, ge=1 << 20, description="The same in bytes.")
    replicated_min_replicas: int = Field(
        1, ge=1, description="Replicas that must confirm an append of level `replicated`."
    )
    idempotency_window_seconds: float = Field(
        600.0, ge=1, description="How long, at least, a repeated id gets its first receipt again from Redis."
    )
    max_item_bytes: int = Field(1 << 20, ge=1024, description="One item's JSON.")
    max_batch_bytes: int = Field(4 << 20, ge=1024, description="All items of one append together.")
    max_batch_items: int = Field(500, ge=1, le=MOST_BATCH_ITEMS, description="Items of one append.")

    view_max_bytes: int = Field(
        64 << 10,
        ge=0,
        le=16 << 20,
        description="What the cached view of one conversation holds in Redis at the most; 0: no views.",
    )
    view_max_items: int = Field(
        100, ge=1, le=1_000, description="The newest items that a view keeps when it is cut back."
    )
    cache_ttls: dict[str, float] = Field(
        {"conversation": 900.0},
        description="Seconds for which a cached type is kept, as a JSON object; others keep their default.",
    )

    flush_interval_seconds: float = Field(
        0.5, gt=0, description="The oldest unflushed item is flushed after this."
    )
    flush_max_turns: int = Field(
        5_000, ge=1, description="Unflushed items that trigger a flush; also its largest batch."
    )
    flush_max_bytes: int = Field(
        8 << 20, ge=1 << 10, description="Unflushed bytes that trigger a flush; also its largest batch."
    )
    lease_seconds: float = Field(
        3.0, ge=0.3, description="A shard's owner that is silent for this long loses the shard."
    )

    high_water_bytes: int = Field(
        512 << 20,
        ge=1 << 16,
        description="Unflushed bytes, all shards together, above which appends are refused (503).",
    )
    high_water_memory_share: float = Field(
        0.85, gt=0, le=1, description="The same as a share of Redis's maxmemory, if it has one."
    )
    retained_max_bytes: int = Field(
        256 << 20,
        ge=1 << 16,
        description="What one process holds until it is in Postgres; above it, its appends are refused.",
    )
    low_water_share: float = Field(
        0.8, gt=0, lt=1, description="Appends are taken again below this share of the high-water mark."
    )

    events_buffer_max: int = Field(
        256, ge=1, description="Events held for one listener; one that falls further behind is told so."
    )

    redis_lost_seconds: float = Field(
        0.7,
        ge=0.1,
        description="Redis that does not answer any flusher for so long is lost: appends go to Postgres.",
    )
    heartbeat_timeout_seconds: float = Field(
        5.0,
        ge=1,
        description="An accepting process that is silent for so long is taken for dead; it acks nothing "
        "meanwhile.",
    )
    write_off_seconds: float = Field(
        30.0,
        ge=0,
        description="A dead process is waited for so long, after Redis lost data that it may have had copies "
        "of; then its items are counted as lost.",
    )

    summarizer: Literal["none", "extractive", "openai"] = Field(
        "none",
        description="Who makes summaries, in the flushers: `extractive` picks sentences and needs no model; "
        "`openai` asks an OpenAI-compatible endpoint.",
    )
    summarizer_base_url: str = Field(
        "https://api.openai.com/v1", description="The endpoint, up to what comes before `/chat/completions`."
    )
    summarizer_model: str = Field(
        "", validate_default=True, description="The endpoint's model; needed with `openai`."
    )
    summarizer_api_key: SecretStr = Field(
        SecretStr(""), description="Its key; never shown. Empty: none is sent."
    )
    summarizer_timeout_seconds: float = Field(
        30.0, gt=0, description="One call of the summarizer; one that takes longer is tried again later."
    )
    summary_every_items: int = Field(
        40, ge=1, description="So many items that no summary covers, besides the newest, make one due."
    )
    summary_keep_items: int = Field(
        20, ge=0, description="The newest items of a conversation, which a summary leaves out."
    )
    summary_max_bytes: int = Field(8 << 10, ge=512, le=1 << 20, description="One summary's text, in UTF-8.")

    redis_timeout_seconds: float = Field(
        1.0, gt=0, description="One round trip to Redis, connecting included."
    )
    postgres_timeout_seconds: float = Field(30.0, gt=0, description="One statement in Postgres.")
    postgres_pooled: bool = Field(
        False,
        description="Postgres is behind a transaction pooler such as pgbouncer: no prepared statements.",
    )
    postgres_pool_max: int = Field(8, ge=2, description="Postgres connections of one process.")

    @property
    def conversation_ttl_seconds(self) -> float:
        """How long a conversation's view lives after it was read or begun."""
        return self.cache_ttls.get("conversation", 900.0)

    @field_validator("cache_ttls")
    @classmethod
    def _are_positive(cls, ttls: dict[str, float]) -> dict[str, float]:
        if any(ttl <= 0 for ttl in ttls.values()):
            raise ValueError("each must be a positive number of seconds")
        return ttls

    @field_validator("redis_url", "postgres_url")
    @classmethod
    def _parses(cls, url: str) -> str:
        """Refuse here what the drivers would refuse later, quoting a part of the password as the port."""
        if not _is_url(url):
            raise ValueError("must be a URL; in a password, write / ? # @ as %2F %3F %23 %40")
        return url

    @field_validator("summarizer_base_url")
    @classmethod
    def _leads_to_an_endpoint(cls, url: str) -> str:
        """The URL stands in the client's log lines, so it must not hold what is secret."""
        parts = urlsplit(url) if _is_url(url) else None
        if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "must not hold a user, a query or a fragment; a key is BUFFER_SUMMARIZER_API_KEY"
            )
        return url.rstrip("/")

    @field_validator("summarizer_model")
    @classmethod
    def _names_a_model(cls, model: str, info: ValidationInfo) -> str:
        if not model and info.data.get("summarizer") == "openai":
            raise ValueError("must be set when BUFFER_SUMMARIZER is openai")
        return model

    @field_validator("summarizer_api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr) -> SecretStr:
        """Refuse here what the HTTP client would refuse later, quoting it. A final line break is harmless."""
        text = key.get_secret_value().strip()
        if not all("!" <= character <= "~" for character in text):
            raise ValueError("must be visible ASCII characters")
        return SecretStr(text)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, the environment over ``.env``, that over a config file."""
        sources = [init_settings, env_settings, dotenv_settings, file_secret_settings]
        if cls.model_config.get("toml_file"):
            sources.append(TomlConfigSettingsSource(settings_cls))
        return tuple(sources)

    @classmethod
    def load(cls, config: Path | None = None, **overrides: Any) -> Self:
        """Read the settings; ``config`` is a TOML file of lower rank than the environment.

        Raises:
            SettingsError: a value is wrong; the message names each setting and its limit.
        """
        source: type[Self] = cls
        if config is not None:
            if not config.is_file():
                raise SettingsError(f"config file {config} does not exist")
            source = type(cls.__name__, (cls,), {"model_config": {**cls.model_config, "toml_file": config}})
        try:
            return source(**overrides)
        except ValidationError as error:
            lines = [_line(e["loc"], e["msg"], e["input"]) for e in error.errors()]
            raise SettingsError("\n".join(lines)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise SettingsError(f"the settings cannot be read: {error}") from error

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What ``repr`` and ``str`` show."""
        return [(name, _shown(name, value)) for name, value in super().__repr_args__()]


def _line(where: tuple[int | str, ...], problem: str, value: Any) -> str:
    name = ".".join(map(str, where))
    return f"BUFFER_{name.upper()}: {problem} (got {_shown(name, value)!r})"
