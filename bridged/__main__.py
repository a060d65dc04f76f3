"""``python -m bridged`` is the command ``bridged``."""

from __future__ import annotations

import sys

from bridged.cli import main

if __name__ == "__main__":
    sys.exit(main())
