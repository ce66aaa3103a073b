"""The command line: one file per subcommand, options → one core call → print.

Nothing numeric is imported here at module level, so help and completion stay fast.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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


class Command(TyperCommand):
    """A subcommand whose options stand in sections, as its parameters' help panels say."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Typer's own plain help puts all options into one section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = f"{parameter.param_type_name.capitalize()}s"
                title = getattr(parameter, "rich_help_panel", None) or usual
                sections.setdefault(title, []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    name="oodcli",
    help=(
        "Tells which inputs a trained image classifier should not be trusted on, from its "
        "checkpoint; with the training data or without."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # to import rich takes longer than all the rest of --help
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Where they are None, typer imports pydantic to convert that to a bool.
        "default_map": {"help": False, "install_completion": False, "show_completion": False},
    },
)
for module in (inspect, invert, extract, fit, score, evaluate, detectors, demo):
    # As a short_help, the docstring is not cut where the list of commands is narrow.
    app.command(module.__name__.rpartition(".")[2], cls=Command, short_help=module.command.__doc__)(
        module.command
    )


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
    if "_OODCLI_COMPLETE" in os.environ:
        # Typer converts the values before the word to be completed and passes over what fails.
        # Nobody reads them, and pydantic, which converts them, takes longer than all the rest.
        sys.modules.setdefault("pydantic", None)  # type: ignore[arg-type]
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except OodcliError as error:
        console.say(f"oodcli: {console.harmless(str(error))}", always=True)
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
