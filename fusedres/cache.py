"""The folder in which this package keeps what it has found out or compiled on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where this user's files are: ``FUSEDRES_CACHE_DIR``, else ``fusedres`` in the user's cache folder."""
    chosen = os.environ.get("FUSEDRES_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedres"
