"""What the shell completes, and what help and version say."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from commands import oodcli

from oodcli import detectors
from oodcli._version import __version__
from oodcli.cli import EXAMPLES, app
from oodcli.inversion.objective import OBJECTIVES
from oodcli.networks import inputs, preprocessing
from oodcli.records import ROW_RECORDS

SCRIPTS = Path(__file__).parents[2] / "completions"
COMMANDS = typer.main.get_command(app).commands
RUN = "import sys; sys.argv[0] = 'oodcli'; from oodcli.cli import main; main()"


def test_the_words_are_those_that_are_accepted():
    parameters = {each.name: each for name in COMMANDS for each in COMMANDS[name].params}

    def offered(name):
        return [item.value for item in parameters[name].shell_complete(None, "")]

    assert offered("objective") == list(OBJECTIVES)
    assert offered("interpolation") == list(preprocessing.INTERPOLATIONS)
    assert offered("exif") == list(preprocessing.EXIF)
    assert offered("decode") == list(preprocessing.DECODE)
    assert offered("crop") == list(inputs.CROPS)
    # Sensitivities are measured while images are inverted, and cannot be asked for.
    assert set(offered("record")) == set(ROW_RECORDS) - {"layers.sensitivity"} | {"all"}


# ---------------------------------------------------------------------------- in the shells


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files with awkward names in the working directory, and ``oodcli`` on the path."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "oodcli"
    program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(RUN)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    files = tmp_path / "files"
    (files / "my images").mkdir(parents=True)
    (files / "my net.pt").touch()
    monkeypatch.chdir(files)
    return tmp_path


WITH_E = sorted(name for name in detectors.names() if name.startswith("e"))
BASH = r"""
source "$1"
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
_oodcli_completion oodcli
printf '%s\n' "${COMPREPLY[@]}"
complete -p oodcli
"""
OFFERED = [
    ("oodcli sc", ["score"]),
    ("oodcli score x.pt --forc", ["--force"]),
    ("oodcli score x.pt -d e", WITH_E),
    ("oodcli score x.pt --arch resnet20-cifar-", ["resnet20-cifar-b"]),
    ("oodcli extract x.pt y --record emb", ["embedding"]),
    ("oodcli extract x.pt y --record al", ["all"]),
    ("oodcli extract x.pt y --record logits,odi", ["logits,odin.logits"]),
    ("oodcli extract x.pt y --for msp,odi", ["msp,odin"]),
    ("oodcli extract x.pt y --for odin,odi", []),
    ("oodcli invert x.pt --objective p", ["paper", "patches"]),
]


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(("line", "offered"), [*OFFERED, ("oodcli invert m", [])])
def test_bash(folder, line, offered):
    given = ["bash", "--norc", "-c", BASH, "bash", SCRIPTS / "oodcli.bash", *line.split()]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    *found, installed = done.stdout.split("\n")[:-1]
    assert (sorted(found), done.stderr) == (offered or [""], "")
    assert "-o default" in installed  # where nothing is offered, bash completes files


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
@pytest.mark.parametrize(
    ("line", "offered"), [*OFFERED, ("oodcli invert m", ["my images/", "my net.pt"])]
)
def test_fish(folder, line, offered):
    code = f"source {SCRIPTS / 'oodcli.fish'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True
    )
    found = sorted(line.partition("\t")[0] for line in done.stdout.splitlines())
    assert (found, done.stderr) == (offered, "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_can_read_its_script():
    subprocess.run(["zsh", "-n", SCRIPTS / "_oodcli"], check=True)


INTERACTIVE = {
    "bash": (
        ".bashrc",
        r"""
PS1='ready> '
source "$COMPLETIONS/oodcli.bash"
bind -x '"\C-t": printf %s "$READLINE_LINE" >"$HOME/typed"; exit'
""",
    ),
    "zsh": (
        ".zshrc",
        r"""
PS1='ready> '
fpath=("$COMPLETIONS" $fpath)
autoload -Uz compinit
compinit -u -d "$HOME/zcompdump"
typed() {
    printf %s "$BUFFER" >"$HOME/typed"
    exit
}
zle -N typed
bindkey '^T' typed
""",
    ),
}
"""A start-up file of each shell, which installs the script and lets Ctrl-T store the line."""


def after_tab(shell, line, home):
    """The line that an interactive shell on a pseudo-terminal shows once Tab is typed after it."""
    name, setup = INTERACTIVE[shell]
    (home / name).write_text(setup, encoding="utf-8")
    terminal, other = os.openpty()
    environment = {**os.environ, "ZDOTDIR": str(home), "COMPLETIONS": str(SCRIPTS), "TERM": "dumb"}
    started = subprocess.Popen(
        [shell, "-i"],
        stdin=other,
        stdout=other,
        stderr=other,
        env=environment,
        start_new_session=True,
    )
    os.close(other)
    alarm = threading.Timer(60, started.kill)
    alarm.start()
    shown = b""
    with contextlib.suppress(OSError):  # reading fails once the shell has closed its end
        while b"ready> " not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, line.encode() + b"\t\x14")
        while os.read(terminal, 1000):
            pass
    assert started.wait() == 0, shown
    alarm.cancel()
    os.close(terminal)
    return (home / "typed").read_text(encoding="utf-8").rstrip()


@pytest.mark.parametrize("shell", INTERACTIVE)
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("oodcli sco", "oodcli score"),
        ("oodcli invert my\\ n", "oodcli invert my\\ net.pt"),
        ("oodcli score my\\ net.pt -d energy-n", "oodcli score my\\ net.pt -d energy-norm"),
        ("oodcli score x --arch torchvision:alex", "oodcli score x --arch torchvision:alexnet"),
        ("oodcli score x.pt --arch my", "oodcli score x.pt --arch my\\"),
        ("oodcli extract x.pt y --record emb", "oodcli extract x.pt y --record embedding"),
        (
            "oodcli extract x.pt y --record logits,odi",
            "oodcli extract x.pt y --record logits,odin.logits",
        ),
    ],
)
def test_a_terminal(folder, shell, line, completed):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    assert after_tab(shell, line, folder) == completed


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("oodcli score x.pt y --arch=torchvision:alex", "--arch=torchvision:alexnet"),
        ("oodcli extract x.pt y --record=emb", "--record=embedding"),
        ("oodcli evaluate --id x --ood far=my\\ n", "--ood far=my\\ net.pt"),
        ("oodcli score x.pt a:b -d energy-n", "-d energy-norm"),
    ],
)
def test_bash_splits_words_at_colons_and_equals_signs(folder, line, completed):
    assert after_tab("bash", line, folder).endswith(completed)


@pytest.mark.parametrize(
    ("shell", "script"), [("bash", "oodcli.bash"), ("zsh", "_oodcli"), ("fish", "oodcli.fish")]
)
def test_the_scripts_are_those_that_the_command_prints(folder, shell, script):
    """To write one: ``_OODCLI_COMPLETE=source_zsh oodcli | grep . >completions/_oodcli``."""
    environment = {**os.environ, "_OODCLI_COMPLETE": f"source_{shell}"}
    done = subprocess.run(["oodcli"], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines(keepends=True) if line.strip()]
    assert (SCRIPTS / script).read_text("utf-8") == "".join(lines)


@pytest.mark.parametrize(
    ("shell", "where"),
    [
        ("bash", ".bash_completions/oodcli.sh"),
        ("zsh", ".zfunc/_oodcli"),
        ("fish", ".config/fish/completions/oodcli.fish"),
    ],
)
def test_the_script_is_shown_and_installed(shell, where, tmp_path, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # no "python -m pytest"
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = oodcli("--show-completion").out
    assert f"_OODCLI_COMPLETE=complete_{shell}" in shown
    result = oodcli("--install-completion")
    assert result.status == 0
    assert str(tmp_path / where) in result.out
    assert (tmp_path / where).read_text("utf-8").strip() == shown.strip()


def test_an_unknown_shell_is_an_error(monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("tcsh", "/bin/tcsh"))
    for option in ("--show-completion", "--install-completion"):
        result = oodcli(option)
        assert result.status == 1
        assert "tcsh" in result.err + result.out


# ---------------------------------------------------------------------------- help and version


def commands_of(text):
    return text.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_understood(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = oodcli(name, "--help").out
    examples = page.partition("\nExamples:\n")[2]
    assert re.sub(r"^  ", "", examples, flags=re.MULTILINE) == EXAMPLES[name]
    assert max(map(len, examples.splitlines())) <= 80
    for line in commands_of(EXAMPLES[name]):
        program, command, *words = shlex.split(line)
        assert (program, command) == ("oodcli", name)
        COMMANDS[command].make_context(command, words)


def test_an_example_with_a_wrong_option_would_be_noticed():
    with pytest.raises(Exception, match="No such option: --fprr"):
        COMMANDS["score"].make_context("score", ["x.pt", "y", "--fprr", "0.1"])


def test_version_says_what_a_report_needs(monkeypatch):
    found = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    result = oodcli("--version")
    assert result.status == 0
    first, python, libraries, processor, gpu, *_ = result.out.splitlines()
    assert first == f"oodcli {__version__}"
    assert python.startswith(f"Python {'.'.join(map(str, sys.version_info[:3]))}")
    assert libraries.startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert re.fullmatch(r"cpu: .*, bfloat16 (in hardware|emulated)", processor)
    assert gpu == "cuda:0: NVIDIA H200, 150.0 GiB"


def test_version_tells_of_a_torch_that_cannot_be_used(monkeypatch):
    def broken():
        raise RuntimeError("the driver is too old\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert oodcli("--version").out.splitlines()[-1] == "torch cannot be used: the driver is too old"
