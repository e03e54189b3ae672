"""Where a run's numbers go: JSON lines that travel with the checkpoints, and wandb.

Object stores cannot append, and a line written after the last checkpoint describes steps that a
restart will repeat. So lines are kept until the next checkpoint takes them along.
"""

import json
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from pretrain.checkpoint import METRICS_NAME


class MetricsLog:
    """Rank 0's log. wandb resumes under the same id, so a restarted run stays one curve."""

    def __init__(self, config: RunConfig, local_dir: Path) -> None:
        self._lines: list[str] = []
        self._wandb: Any = None
        if config.wandb.mode != "disabled":
            import wandb

            self._wandb = wandb.init(
                project=config.wandb.project,
                id=config.name,
                name=config.name,
                resume="allow",
                mode=config.wandb.mode,
                dir=str(local_dir),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )

    def record(self, values: dict[str, float]) -> None:
        """Keep one line, which must hold `step`, for the next checkpoint; send it to wandb."""
        self._lines.append(json.dumps(values))
        if self._wandb is not None:
            self._wandb.log(values, step=int(values["step"]))

    def write_to(self, folder: Path) -> None:
        """Write the kept lines into a checkpoint's folder and forget them."""
        (folder / METRICS_NAME).write_text("".join(line + "\n" for line in self._lines))
        self._lines.clear()

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
