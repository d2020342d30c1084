"""The one logger of the package; nothing in the package prints, except a message that ends the job."""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger = logging.getLogger("heatopt")
