"""``python -m buffer``."""

from __future__ import annotations

from buffer.cli import main

if __name__ == "__main__":
    main()
