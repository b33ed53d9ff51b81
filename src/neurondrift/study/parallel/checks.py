"""What several processes cannot do, found before any work begins."""

from __future__ import annotations

from neurondrift.base.errors import ConfigError
from neurondrift.base.processes import process_count


def enough_for_each(items: int, what: str, setting: str) -> None:
    """Raise `ConfigError` where there are more processes than `items`, of which each is to have some."""
    if process_count() > items:
        raise ConfigError(
            f"There are more processes than {what}: some would have nothing to do",
            received=f"{process_count()} processes",
            allowed=f"{items} or fewer, as {setting} is now",
            fix=f"start fewer processes (--nproc-per-node), or raise {setting}",
        )
