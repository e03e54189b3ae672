"""How a verb ends: one clear line of error, and the exit code that belongs to it."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def clear_errors(*, goes_on: bool = False) -> Iterator[None]:
    """Turn what can go wrong into one line on standard error and an exit code.

    Args:
        goes_on: after Ctrl-C, the same command takes up its work where it was.
    """
    from concurrent.futures import BrokenExecutor

    from cluster.export import ExportFailedError
    from cluster.launch import RunFailedError, RunStoppedError
    from cluster.on_tars import TarWorkFailedError
    from cluster.session import ClusterError
    from data_pipelines.local_s3 import LocalS3Error

    refusals = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
    failures = (
        RunFailedError,
        ExportFailedError,
        TarWorkFailedError,
        ClusterError,
        LocalS3Error,
        BrokenExecutor,
    )
    try:
        yield
    except refusals as error:
        typer.echo(f"diti: {error}", err=True)
        raise typer.Exit(2) from error
    except RecursionError as error:
        typer.echo("diti: an input is nested too deeply to be read", err=True)
        raise typer.Exit(2) from error
    except (*failures, OSError) as error:
        typer.echo(f"diti: {error}", err=True)
        raise typer.Exit(1) from error
    except RunStoppedError as error:
        typer.echo(f"diti: {error}", err=True)
        raise typer.Exit(130) from error
    except KeyboardInterrupt:
        remedy = "; run the same command again to go on" if goes_on else ""
        typer.echo(f"diti: interrupted{remedy}", err=True)
        raise typer.Exit(130) from None
