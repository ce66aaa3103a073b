"""The command line: one file per subcommand, options → one core call → print.

Nothing numeric is imported here at module level, so help and completion stay fast.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from oodcli.cli import (
    console,
    demo,
    detectors,
    evaluate,
    extract,
    fit,
    inspect,
    interrupts,
    invert,
    score,
)
from oodcli.errors import OodcliError

app = typer.Typer(
    name="oodcli",
    help=(
        "Tells which inputs a trained image classifier should not be trusted on, from its "
        "checkpoint; with the training data or without."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (inspect, invert, extract, fit, score, evaluate, detectors, demo):
    app.command(module.__name__.rpartition(".")[2])(module.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from oodcli import __version__

        print(f"oodcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of oodcli itself."""
    log = logging.getLogger("oodcli")
    log.handlers[:] = [console.Notes()]
    log.setLevel(logging.INFO)
    # A compiler without a GPU need not be told of.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # What Pillow warns of is in the row of that image, or does not matter.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # torch 2.11 warns of itself when an exported program is loaded and run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


def main() -> None:
    """Runs the command line. A fault of the user's is one sentence and status 1; a fault of ours
    keeps its traceback."""
    interrupts.listen()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except OodcliError as error:
        console.say(f"oodcli: {error}", always=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # With EPIPE whoever read our output has gone, and there is nobody left to tell.
        if error.errno != errno.EPIPE:
            console.say(
                f"oodcli: standard output could not be written: {error.strerror}", always=True
            )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
