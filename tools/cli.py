"""The `diti` command: its verbs and their groups.

Exit codes: 0 done, 1 a run that failed, 2 usage or configuration refused, 130 interrupted.
"""

import logging
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from tools.commands import backbone, data, evaluate, features, runs

app = typer.Typer(
    name="diti",
    help="Pre-train the DiTi encoder on image shards and read its features by time-step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (runs.demo, runs.plan, runs.train, runs.export, runs.publish, runs.report):
    app.command()(verb)
# Behind the folder, everything is the other command's: its options are not ours.
app.command(context_settings={"allow_interspersed_args": False})(runs.s3)
app.add_typer(data.app, name="data")
app.add_typer(backbone.app, name="backbone")
app.add_typer(features.app, name="features")
app.add_typer(evaluate.app, name="eval")


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the `diti` command."""
    # `kill` unwinds like Ctrl-C does, so that servers and workers end with us.
    signal.signal(signal.SIGTERM, _terminated)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(app())


if __name__ == "__main__":
    main()
