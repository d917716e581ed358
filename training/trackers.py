"""Accelerate's trackers, which may fail without harm."""

import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from training.config import ConfigError


logger = logging.getLogger(__name__)


def check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not know, or whose package is missing: it would leave it out in silence."""
    known = ["none", "all", *LOGGER_TYPE_TO_CLASS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"train.tracker={name!r} is no tracker that Accelerate knows; {hint}")
    if name in LOGGER_TYPE_TO_CLASS and name not in map(str, get_available_trackers()):
        raise ConfigError(
            f"train.tracker={name!r} needs a package that is not installed: pip install {name}, or set "
            "train.tracker=none (metrics.jsonl has every figure anyway)"
        )


class Trackers:
    """Accelerate's trackers; one that is down is left alone, with a warning, and the run goes on without it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.is_up = accelerator, False

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the tracker that the accelerator was made with."""
        self.is_up = True
        self._try(lambda: self.accelerator.init_trackers(project, config=dict(config)))

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send the numbers of a row."""
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self._try(lambda: self.accelerator.log(numbers, step=step))

    def finish(self) -> None:
        """Let the trackers write what they hold."""
        self._try(lambda: [tracker.finish() for tracker in self.accelerator.trackers])

    def _try(self, action: Callable[[], Any]) -> None:
        if not self.is_up:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker's client may raise
            self.is_up = False
            logger.warning("the tracker failed and gets no more rows; metrics.jsonl has them all: %r", error)
