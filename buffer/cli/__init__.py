"""The command line: ``buffer COMMAND``. Data on stdout, the rest on stderr.

Exit codes: 0 done, 1 failed, 2 usage, 3 a dependency is down, 4 a threshold was exceeded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from buffer.cli.common import EXIT_FAILED, EXIT_USAGE, exit_code_of
from buffer.version import __version__

app = App(
    name="buffer",
    help="A write-behind buffer for chat conversations: acked from Redis Streams, flushed into Postgres.",
    version=__version__,
)

# Each command is a function in a module that is imported only when it is called.
_COMMANDS = {
    "dev": ("buffer.cli.servers:dev", "Start everything embedded: Redis, Postgres and a flusher."),
    "demo": ("buffer.cli.measure:demo", "Append, kill Redis, flush, and count: the main job with its proof."),
    "flusher": (
        "buffer.cli.servers:flusher",
        "Flush shards into Postgres, sharing them with other flushers.",
    ),
    "migrate": ("buffer.cli.servers:migrate", "Bring the database's schema up to this release."),
    "status": ("buffer.cli.status:status", "Show every shard: owner, unflushed items, flush lag."),
    "doctor": ("buffer.cli.doctor:doctor", "Check both stores, the path, and the ledger of losses."),
    "tail": ("buffer.cli.data:tail", "Show the newest items of a conversation."),
    "import": ("buffer.cli.data:import_", "Load conversations from JSONL straight into Postgres."),
    "export": ("buffer.cli.data:export", "Write conversations as JSONL."),
    "erasures": (
        "buffer.cli.erasures:app",
        "Export what was erased, and erase it again in a restored database.",
    ),
    "dlq": ("buffer.cli.dlq:app", "List, show, retry or drop items that could not be stored."),
    "bench": ("buffer.cli.measure:bench", "Measure appends, flush and memory beside their baselines."),
}
for _name, (_target, _help) in _COMMANDS.items():
    app.command(_target, name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    try:
        result = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `buffer export | head`
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        print(f"buffer: {error}", file=sys.stderr)
        sys.exit(code)
    sys.exit(result if isinstance(result, int) else 0)
