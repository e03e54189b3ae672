"""Where a run's numbers go: JSON lines that travel with the checkpoints, and wandb.

Object stores cannot append, and a line written after the last checkpoint describes steps that a
restart will repeat. So lines are kept until the next checkpoint takes them along.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from configs.schema import RunConfig
from pretrain.journal import Journal
from pretrain.preflight import run_url
from pretrain.world import World


class MetricsLog:
    """A run's numbers; only the first rank's are kept. Used as a context, which ends wandb's run.

    wandb resumes under the same id, so a restarted run stays one curve.
    """

    def __init__(self, config: RunConfig, local_dir: Path, world: World) -> None:
        self._keeps = world.is_first
        self.journal = Journal()
        self._wandb: Any = None
        if self._keeps and config.wandb.mode != "disabled":
            import wandb

            where = hashlib.sha256(run_url(config).encode()).hexdigest()[:8]
            self._wandb = wandb.init(
                project=config.wandb.project,
                id=f"{config.name}-{where}",
                name=config.name,
                resume="allow",
                mode=config.wandb.mode,
                dir=str(local_dir),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def record(self, values: dict[str, float]) -> None:
        """Keep one line, which must hold `step`, for the next checkpoint; send it to wandb."""
        if self._keeps:
            self.journal.add([json.dumps(values)])
        if self._wandb is not None:
            self._wandb.log(values, step=int(values["step"]))
