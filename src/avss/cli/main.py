"""The command `avss`: parses, calls one function of the API, prints. Importing it imports no torch."""

import errno
import os
import sys
from typing import Annotated

import typer

from avss import __version__
from avss.cli import (
    compare,
    damage,
    demo,
    evaluate,
    from_csv,
    heal,
    inspect,
    prune,
    report,
    run,
    score,
    stability,
    verify,
)
from avss.errors import AvssError, UserError

app = typer.Typer(
    name="avss",
    help="Find the blocks that a transformer can do without, prove it, and ship the smaller model.",
    epilog="Start with `avss demo`, or `avss inspect MODEL`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"avss {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


for verb in (run, score, damage, compare, stability, prune, heal, verify, evaluate, report, inspect, from_csv, demo):
    app.command(name=verb.__name__.rsplit(".", 1)[-1].replace("_", "-"))(verb.command)


def main() -> None:
    """A `UserError` is one sentence and exit code 2, a `VerificationError` exit code 1, a bug a traceback."""
    # Our own bars and tables speak; the libraries below stay silent unless something is wrong.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except AvssError as error:
        _fail(str(error), code=2 if isinstance(error, UserError) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPIPE):
            raise
        _fail(f"{error.strerror}: `{error.filename or 'output'}`. Nothing was published.", code=1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(
            "Out of memory. Use a smaller `--batch-size` or `--seq-len`, another `--device`, or `--dtype bfloat16`.",
            code=1,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error)


def _fail(message: str, *, code: int) -> None:
    typer.secho(f"avss: {message}", err=True, fg="red" if sys.stderr.isatty() else None)
    raise SystemExit(code)
