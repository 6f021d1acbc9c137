"""Keep runs in trackio, which brings no logger for Lightning of its own."""

from __future__ import annotations

import importlib.util
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from alignkit.errors import AlignkitError


class TrackioLogger(Logger):
    """Log metrics and settings to trackio (https://github.com/gradio-app/trackio).

    Needs the package trackio. Runs are kept on this machine, where ``TRACKIO_DIR`` says, unless a
    Space is named; ``trackio show --project PROJECT`` shows them.

    Args:
        project: The project that the run belongs to.
        run: Name of the run; default: the time at which it starts.
        save_dir: Folder for checkpoints, in ``PROJECT/RUN``.
        group: Name of a group of runs.
        space_id: A Space of the Hub that keeps the runs instead, ``user/name``.

    Raises:
        AlignkitError: trackio is not installed.
    """

    def __init__(
        self,
        project: str = "alignkit",
        run: str | None = None,
        save_dir: str = "runs",
        group: str | None = None,
        space_id: str | None = None,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("trackio") is None:
            raise AlignkitError("trainer.logger TrackioLogger: run pip install trackio")
        self._project = project
        self._name = run or time.strftime("%Y%m%d-%H%M%S")
        self._save_dir = save_dir
        self._options = {"group": group, "space_id": space_id}
        self._settings: dict[str, Any] = {}
        self._run: Any = None
        self._resume = "never"

    @property
    def name(self) -> str:
        """Return the project."""
        return self._project

    @property
    def version(self) -> str:
        """Return the run's name."""
        return self._name

    @property
    def save_dir(self) -> str:
        """Return the folder for checkpoints."""
        return self._save_dir

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Keep settings, which trackio takes as a run begins; names with ``_`` are its own."""
        given = params if isinstance(params, Mapping) else vars(params)
        self._settings |= {key: given[key] for key in given if not key.startswith("_")}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by the optimizer step."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self._project,
                self._name,
                config=self._settings,
                resume=self._resume,
                embed=False,
                **self._options,
            )
            self._resume = "must"  # another stage of the same trainer adds to the run
        self._run.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left of the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
