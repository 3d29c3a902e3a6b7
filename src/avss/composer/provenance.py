"""When, and with what: the part of a record that every verb fills alike. No torch."""

import datetime
import importlib.metadata
import platform

import avss


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    return {
        "avss": avss.__version__,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }
