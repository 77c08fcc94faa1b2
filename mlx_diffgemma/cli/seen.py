"""What has been said today already, over all runs."""

import os
import time
from pathlib import Path

DAY = 24 * 60 * 60  # seconds


def state_folder() -> Path:
    """The folder of what is kept between runs."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mlx-diffgemma"


def first_today(name: str) -> bool:
    """Whether nothing has asked for this name for a day; from now on it has.

    Where nothing can be kept, it is always the first time.
    """
    try:
        mark = state_folder() / name
        now = time.time()
        if mark.exists() and 0 <= now - mark.stat().st_mtime < DAY:
            return False
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        os.utime(mark, (now, now))
    except (OSError, RuntimeError):  # a full disk, another's folder, no home
        pass
    return True
