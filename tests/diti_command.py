"""The `diti` command in this process: exit code, standard output, standard error."""

from typer.testing import CliRunner, Result

from tools.cli import app


def diti(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))
