"""The command line: one file per subcommand, options → one core call → print.

Nothing numeric is imported here at module level, so help and completion stay fast.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from oodcli.cli import (
    completions,
    console,
    demo,
    detectors,
    evaluate,
    extract,
    fit,
    inspect,
    interrupts,
    invert,
    merge,
    prepare,
    score,
    show,
    versions,
)
from oodcli.errors import OodcliError

EXAMPLES = {
    "inspect": """\
oodcli inspect ckpt.pt
oodcli inspect --verify v.features.h5 ckpt.pt
""",
    "prepare": """\
oodcli prepare ckpt.pt --accuracy 0.917
oodcli prepare ckpt.pt --images known/ --dry-run
""",
    "invert": """\
oodcli invert ckpt.pt --per-class 50 -o v.h5
oodcli invert ckpt.pt --per-class 2500 --dry-run
""",
    "extract": """\
oodcli extract ckpt.pt v.h5 -o v.features.h5
oodcli extract ckpt.pt w.h5 --match-accuracy 0.917 -o pool.h5
""",
    "fit": """\
oodcli fit v.features.h5 -d c2ir-z -d knn -p knn.k=20 -o detectors
oodcli fit -d detectors/c2ir-z.safetensors --calibrate pool.h5 -o calibrated
""",
    "score": """\
oodcli score ckpt.pt photos/ -d detectors/c2ir-z.safetensors -d energy
oodcli score ckpt.pt incoming/ -d calibrated/c2ir-z.safetensors \\
    --fpr 0.01 --max-ood-fraction 0.05 -o scores.csv
""",
    "evaluate": """\
oodcli evaluate --id id.csv --ood far=far.csv --ood blobs=blobs.csv -o report
oodcli evaluate --id id.csv --ood far=far.csv --min-auroc 0.9
oodcli evaluate --layers id.h5 --ood far=far.h5 --virtual v.features.h5 \\
    --images v.h5 -o figures
""",
    "show": """\
oodcli show scores.csv
oodcli show scores.csv --images /mnt/photos -o page.html
""",
    "merge": """\
oodcli merge v1.h5 v2.h5 v3.h5 -o v.h5
oodcli merge parts/*.csv -o scores.csv --max-ood-fraction 0.05
""",
    "detectors": """\
oodcli detectors knn c2ir-peak
oodcli detectors --needs virtual --search energy
oodcli detectors --json
""",
    "demo": """\
oodcli demo -o oodcli-demo
""",
}
"""Examples at the end of each command's help."""


class Command(TyperCommand):
    """A subcommand whose help groups options by their help panel and ends with examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per panel; typer's plain help has only one."""
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

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples without wrapping."""
        with formatter.section("Examples"):
            for line in EXAMPLES[str(self.name)].splitlines():
                formatter.write(f"  {line}\n")

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.BadParameter for --quiet with --verbose."""
        quiet, verbose = (bool(ctx.params.get(name)) for name in ("quiet", "verbose"))
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose contradict each other: give one", ctx)
        with console.command(quietly=quiet, in_detail=verbose):
            if verbose:
                console.detail(versions.in_short())
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                console.say("oodcli: interrupted", always=True)
                raise


app = typer.Typer(
    name="oodcli",
    help=(
        "Find the images that an image classifier should not be trusted on, using its checkpoint; "
        "with or without the training data."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # to import rich takes longer than all the rest of --help
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Where one is None, typer imports pydantic to convert that to a bool.
        "default_map": {"help": False, "install_completion": False, "show_completion": False},
    },
)
for module in (
    *(inspect, prepare, invert, extract, fit, score, show, merge, evaluate, detectors),
    demo,
):
    # As a short_help, the docstring is not cut where the list of commands is narrow.
    app.command(module.__name__.rpartition(".")[2], cls=Command, short_help=module.command.__doc__)(
        module.command
    )


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        for line in versions.lines():
            print(line, flush=True)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the versions and the devices.",
        ),
    ] = False,
) -> None:
    """Options of oodcli itself."""
    console.heed(logging.INFO)
    # torch reports a compiler without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # An image that Pillow warns about is decoded, or has a row with an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # torch 2.11 warns about its own code when it loads and runs an exported program.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


def main() -> None:
    """Run the command line. A user's error is one sentence and status 1; a bug is a traceback."""
    # Before torch is imported. By default, idle threads spin for milliseconds and slow down other
    # processes; those that sleep at once wake up late for the next operation. The number is
    # libgomp's own for a processor with more threads than it can run.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is written as \xNN
            stream.reconfigure(errors="backslashreplace")
    interrupts.listen()
    completions.complete_at_the_first_tab()
    if "_OODCLI_COMPLETE" in os.environ:
        completions.without_heavy_imports()
    if os.environ.get("_OODCLI_COMPLETE") == "complete_bash":
        completions.join_words_of_bash()
    try:
        app()
    except KeyboardInterrupt:
        # Once an interrupt has passed through exec of a string, as in torch's generated code,
        # ``python -m`` ends with the signal whatever the status; any other exec clears that.
        exec("")
        sys.exit(130)
    except OodcliError as error:
        who = f" ({console.who})" if console.who else ""
        console.say(f"oodcli{who}: {console.harmless(error.text)}", always=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # With EPIPE the reader of our output has gone.
        if error.errno != errno.EPIPE:
            console.say(
                f"oodcli: standard output could not be written: {error.strerror}", always=True
            )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
