"""A loss curve that grows while a notebook trains."""

import time
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from transformers import TrainerCallback

from utils.plots import training_curves
from utils.results import read_lines, split_log

SECONDS_BETWEEN = 10  # a drawing takes about a third of a second


class LiveCurve(TrainerCallback):
    """Draws the run's log anew every few seconds, in place; only in a notebook.

    Args:
        log: the run's log.
        model: key of `utils.config.MODELS`; it gives colour and marker.
        title: above the figure.
    """

    def __init__(self, log: Path, model: str, title: str):
        self.log, self.model, self.title = log, model, title
        self.handle: DisplayHandle | None = None
        self.last = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if hasattr(get_ipython(), "kernel") and state.is_world_process_zero:
            self.handle = display({"text/plain": "the curve comes here"}, **_NEW)

    def on_log(self, args, state, control, logs: Mapping, **kwargs):
        if self.handle and time.monotonic() - self.last > SECONDS_BETWEEN:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        if self.handle:
            self.draw()

    def draw(self) -> None:
        """Draw the log as it stands, in place of the last drawing."""
        steps, evaluations = split_log(read_lines(self.log))
        if len(steps) < 2 or not evaluations:
            return
        figure = training_curves(steps, evaluations, self.model, self.title)
        self.handle.update(figure)
        plt.close(figure)
        self.last = time.monotonic()


_NEW = {"raw": True, "display_id": True}
