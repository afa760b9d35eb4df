"""Who follows this thread's calls and launches in order to repeat them (`_plan`), if anybody does. Imports nothing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._plan import Recorder


class _Thread(threading.local):
    recorder: Recorder | None = None
    plans = True  # may be found and made


thread = _Thread()
