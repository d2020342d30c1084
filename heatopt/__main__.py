"""``python -m heatopt``."""

from __future__ import annotations

import sys

from heatopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
