"""How a verb ends: one clear line of error, and the exit code that belongs to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

REFUSALS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


@contextmanager
def clear_errors(*, goes_on: bool = False, without: str | None = None) -> Iterator[None]:
    """Turn what can go wrong into one line on standard error and an exit code.

    Args:
        goes_on: after Ctrl-C, the same command takes up its work where it was.
        without: an option that must be left out, if what it asks for was done before that.
    """
    but = f" (without {without}, once it has gone back)" if without else ""
    again = f"; run the same command again{but} to go on" if goes_on else ""
    try:
        yield
    except KeyboardInterrupt:
        _end(f"interrupted{again}", 130)
    except RecursionError:
        _end("an input is nested too deeply to be read", 2)
    except REFUSALS as error:
        _end(str(error), 2)
    except OSError as error:
        _end(str(error), 1)
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        _end(str(error), code)


def _end(message: str, code: int) -> NoReturn:
    typer.echo(f"diti: {message}", err=True)
    raise typer.Exit(code)


def _code_of(error: Exception) -> int | None:
    """Of errors whose modules are too slow to import before one has happened."""
    from concurrent.futures import BrokenExecutor

    from cluster.batch import BatchFailedError
    from cluster.launch import RunFailedError, RunStoppedError
    from cluster.session import ClusterError
    from data_pipelines.local_s3 import LocalS3Error
    from pretrain.feature_export import ExportFailedError

    if isinstance(error, RunStoppedError):
        return 130
    failures = (
        RunFailedError,
        ExportFailedError,
        BatchFailedError,
        ClusterError,
        LocalS3Error,
        BrokenExecutor,
    )
    return 1 if isinstance(error, failures) else None
