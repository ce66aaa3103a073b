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
import torchvision
import typer
from commands import oodcli

from oodcli import detectors
from oodcli._version import __version__
from oodcli.cli import EXAMPLES, app, completions, shells
from oodcli.files import scores
from oodcli.images import generated
from oodcli.inversion.objective import OBJECTIVES
from oodcli.networks import contents, inputs, preprocessing
from oodcli.records import ROW_RECORDS

SCRIPTS = Path(__file__).parents[2] / "completions"
COMMANDS = typer.main.get_command(app).commands
HELP = {parameter.name: parameter.help for parameter in COMMANDS["score"].params}
RUN = "import sys; sys.argv[0] = 'oodcli'; from oodcli.cli import main; main()"


def answered(line):
    """What a script of ours is told, and which modules that took that one can start without."""
    code = (
        "import sys\n"
        "from oodcli.cli import main\n"
        "sys.argv = ['oodcli']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'h5py', 'PIL', 'rich', 'pydantic'}\n"
        "loaded = {name for name, module in sys.modules.items() if module}\n"
        "print('HEAVY', *sorted(heavy & loaded), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "_OODCLI_COMPLETE": "complete_bash", "_OODCLI_LINE": line},
        check=True,
    )
    return done.stdout.splitlines(), done.stderr.partition("HEAVY")[2].split()


# ---------------------------------------------------------------------------- what is offered


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("oodcli sc", ["score\tScore images: higher = more out of distribution."]),
        ("oodcli --version sc", ["score\tScore images: higher = more out of distribution."]),
        ("oodcli score x.pt --forc", ["--force\tOverwrite an existing output."]),
        ("oodcli score x.pt --fp", [f"--fpr\t{HELP['fpr']}"]),
        ("oodcli invert ", [f"<files>\t{' '.join(contents.SUFFIXES)}"]),
        ("oodcli invert my\\ n", [f"my n<files>\t{' '.join(contents.SUFFIXES)}"]),
        ('oodcli invert "my n', [f"my n<files>\t{' '.join(contents.SUFFIXES)}"]),
        ("oodcli score ", [f"<files>\t{' '.join(contents.SUFFIXES)} .h5 .hdf5"]),
        ("oodcli score x.pt ", ["noise:", "torchvision:", "<files>"]),
        ("oodcli score x.pt ph", ["ph<files>"]),
        ("oodcli score x.pt noise:u", ["noise:uniform"]),
        ("oodcli score x.pt torchvision:CIFAR", ["torchvision:CIFAR10", "torchvision:CIFAR100"]),
        (
            "oodcli score x.pt noise:blob -d energy-",
            ["energy-norm", "energy-<files>\t.safetensors"],
        ),
        ("oodcli score x.pt -o s", ["s<files>"]),
        ("oodcli extract x.pt y --for c2ir-z,odi", ["c2ir-z,odin"]),
        ("oodcli extract x.pt y --for odin,odi", [""]),
        ("oodcli extract x.pt y --record emb", ["embedding"]),
        ("oodcli extract x.pt y --record al", ["all"]),
        (
            "oodcli extract x.pt y --record=logits,layers.mean,l",
            [f"logits,layers.mean,layers.{word}" for word in ("std", "gram", "peak", "gradient")],
        ),
        ("oodcli extract x.pt y --record logits,al", [""]),
        ("oodcli score x.pt --arch torchvision:alex", ["torchvision:alexnet"]),
        (
            "oodcli score x.pt --arch=resnet20-cifar-",
            ["resnet20-cifar-b", "resnet20-cifar-<files>\t.py"],
        ),
        ("oodcli fit c.h5 -o ", ["<files>\t/"]),
        ("oodcli fit c", ["c<files>\t.h5 .hdf5"]),
        ("oodcli evaluate --id s", ["s<files>\t.csv .jsonl .parquet"]),
        ("oodcli evaluate --ood far=s", ["far=s<files>\t= .csv .jsonl .parquet .h5 .hdf5"]),
        ("oodcli merge a.h5 b", ["b<files>\t.h5 .hdf5 .csv .jsonl .parquet"]),
        ("oodcli invert x.pt --objective p", ["paper"]),
        ("oodcli invert x.pt --per-class ", [""]),
    ],
)
def test_a_script_is_told_what_fits(line, offered):
    assert answered(line) == (offered, [])


def test_whoever_has_typers_script_gets_no_marks(monkeypatch):
    monkeypatch.delenv("_OODCLI_LINE", raising=False)
    assert completions.images("") == ["noise:", "torchvision:"]
    assert completions.files(".pt")("a") == []


def test_the_tables_name_what_there_is():
    """Every entry is a parameter's, and every parameter that takes a path has one."""
    metavars, names = set(), set()
    for command in COMMANDS.values():
        for parameter in command.params:
            metavars.add(parameter.metavar)
            names.add(parameter.name)
    assert set(completions.BY_METAVAR) <= metavars
    assert set(completions.BY_NAME) <= names
    for registered in app.registered_commands:
        for name, hint in registered.callback.__annotations__.items():
            if "Path" in str(hint):
                [info] = hint.__metadata__
                assert info.autocompletion is not None, (registered.name, name)


def test_the_words_are_those_that_are_taken():
    assert contents.SUFFIXES == completions.CHECKPOINTS
    assert tuple(generated.NOISES) == completions.NOISES
    assert completions.BY_NAME["objective"]("") == list(OBJECTIVES)
    assert completions.BY_NAME["interpolation"]("") == list(preprocessing.INTERPOLATIONS)
    assert completions.BY_NAME["exif"]("") == list(preprocessing.EXIF)
    assert completions.BY_NAME["crop"]("") == list(inputs.CROPS)
    datasets = [word.partition(":")[2] for word in completions.images("torchvision:")]
    assert {"CIFAR10", "SVHN"} <= set(datasets) <= set(torchvision.datasets.__all__)
    assert tuple(scores._SUFFIXES) == completions.SCORES
    # Sensitivities are measured while images are inverted, and cannot be asked for.
    assert set(completions.RECORDS) == set(ROW_RECORDS) - {"layers.sensitivity"}


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
    for name in (
        "my net.pt",
        "my notes.txt",
        "a:b.pt",
        "e*.safetensors",
        "noise.txt",
        "s.csv",
        "f.h5",
    ):
        (files / name).touch()
    monkeypatch.chdir(files)
    return tmp_path


WITH_E = sorted(name for name in detectors.names() if name.startswith("e"))
BASH = r"""
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
_oodcli oodcli "$3" ''
printf '%s\n' "${COMPREPLY[@]}"
"""


def bash(line, word):
    """word: what readline is about to replace."""
    given = ["bash", "--norc", "-c", BASH, "bash", SCRIPTS / "oodcli.bash", line, word]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return sorted(done.stdout.splitlines())


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "word", "offered"),
    [
        ("oodcli sc", "sc", ["score"]),
        ("oodcli invert ", "", ["a:b.pt", "e*.safetensors", "my images", "my net.pt"]),
        ("oodcli invert my", "my", ["my images", "my net.pt"]),
        ("oodcli invert my\\ n", "my\\ n", ["my net.pt"]),
        ('oodcli invert "my n', "my n", ["my net.pt"]),
        ("oodcli invert a:", "", ["b.pt"]),
        ("oodcli invert a\\:", "a\\:", ["a:b.pt"]),
        ("oodcli invert e*", "e*", ["e*.safetensors"]),
        ("oodcli invert ~/files/my\\ n", "~/files/my\\ n", ["~/files/my net.pt"]),
        ("oodcli invert none", "none", [""]),
        ("oodcli score x.pt noise:u", "u", ["uniform"]),
        ("oodcli score x.pt nois", "nois", ["noise.txt", "noise:"]),
        ("oodcli score x.pt --arch torchvision:alex", "alex", ["alexnet"]),
        ("oodcli score x.pt -d e", "e", ["e\\*.safetensors", *WITH_E]),
        ("oodcli evaluate --ood far=s", "s", ["s.csv"]),
        ("oodcli evaluate --ood far=", "", ["f.h5", "my images", "s.csv"]),
        ("oodcli evaluate --ood far=~/files/f", "~/files/f", ["~/files/f.h5"]),
        ("oodcli evaluate --layers f.h5 --ood=far=f", "f", ["f.h5"]),
        ("oodcli extract x.pt y --record lo", "lo", ["logits"]),
        ("oodcli extract x.pt y --record logits,odi", "logits,odi", ["logits,odin.logits"]),
        ("oodcli extract x.pt y --for msp,odi", "msp,odi", ["msp,odin"]),
        ("oodcli evaluate --id=s", "s", ["s.csv"]),
        ("oodcli fit c.h5 -o my", "my", ["my images"]),
    ],
)
def test_bash(folder, line, word, offered):
    assert bash(line, word) == offered


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("oodcli invert my", ["my images/", "my net.pt"]),
        ("oodcli invert 'my n", ["my net.pt"]),
        ("oodcli invert a:", ["a:b.pt"]),
        ("oodcli invert ~/files/a", ["~/files/a:b.pt"]),
        ("oodcli score x.pt noise:u", ["noise:uniform"]),
        ("oodcli score x.pt --forc", ["--force\tOverwrite an existing output."]),
        ("oodcli score x.pt --arch=resnet20-cifar-", ["--arch=resnet20-cifar-b"]),
        ("oodcli evaluate --ood far=s", ["far=s.csv"]),
        ("oodcli evaluate --ood far=", ["far=f.h5", "far=my images/", "far=s.csv"]),
        ("oodcli evaluate --ood=far=f", ["--ood=far=f.h5"]),
        ("oodcli extract x.pt y --record logits,odi", ["logits,odin.logits"]),
        ("oodcli extract x.pt y --for msp,odi", ["msp,odin"]),
        ("oodcli fit c.h5 -o my", ["my images/"]),
    ],
)
def test_fish(folder, line, offered):
    code = f"source {SCRIPTS / 'oodcli.fish'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout.splitlines(), done.stderr) == (offered, "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_can_read_its_script():
    subprocess.run(["zsh", "-n", SCRIPTS / "_oodcli"], check=True)


ZSH = r"""
PS1='ready> '
fpath=("$COMPLETIONS" $fpath)
autoload -Uz compinit
compinit -u -d "$HOME/zcompdump"
typed() {
    LISTMAX=0
    zle complete-word
    print -r -- "$BUFFER" >"$HOME/typed"
    exit
}
zle -N typed
bindkey '^T' typed
"""


def zsh(line, home):
    """The line after Tab was typed behind it, in a zsh on a terminal of its own."""
    (home / ".zshrc").write_text(ZSH, encoding="utf-8")
    terminal, other = os.openpty()
    environment = {**os.environ, "ZDOTDIR": str(home), "COMPLETIONS": str(SCRIPTS), "TERM": "dumb"}
    started = subprocess.Popen(
        ["zsh", "-i", "-d"],  # -d: no files of the system's
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
    with contextlib.suppress(OSError):  # which ends it: nobody has the other end any longer
        while b"ready> " not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, line.encode() + b"\x14")
        while os.read(terminal, 1000):
            pass
    assert started.wait() == 0, shown
    alarm.cancel()
    os.close(terminal)
    return (home / "typed").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("oodcli sco", "oodcli score "),
        ("oodcli invert my\\ n", "oodcli invert my\\ net.pt "),
        ("oodcli evaluate --ood far=s", "oodcli evaluate --ood far=s.csv "),
        (
            "oodcli evaluate --layers f.h5 --ood far=f",
            "oodcli evaluate --layers f.h5 --ood far=f.h5 ",
        ),
        ("oodcli extract x.pt y --record emb", "oodcli extract x.pt y --record embedding "),
        (
            "oodcli extract x.pt y --record logits,odi",
            "oodcli extract x.pt y --record logits,odin.logits ",
        ),
        ("oodcli extract x.pt y --for=msp,odi", "oodcli extract x.pt y --for=msp,odin "),
    ],
)
def test_zsh(folder, line, completed):
    assert zsh(line, folder) == completed


def test_the_scripts_are_those_of_the_code(tmp_path):
    shells.write(tmp_path)
    assert sorted(os.listdir(SCRIPTS)) == sorted(os.listdir(tmp_path))
    for name in os.listdir(SCRIPTS):
        assert (SCRIPTS / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8")


@pytest.mark.parametrize(
    ("shell", "where"),
    [
        ("bash", ".bash_completions/oodcli.sh"),
        ("zsh", ".zfunc/_oodcli"),
        ("fish", ".config/fish/completions/oodcli.fish"),
    ],
)
def test_our_script_is_shown_and_installed(shell, where, tmp_path, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (SCRIPTS / shells.SCRIPTS[shell][0]).read_text("utf-8")
    assert oodcli("--show-completion").out == text
    result = oodcli("--install-completion")
    assert (result.status, result.out) == (0, "")
    assert str(tmp_path / where) in result.err
    assert (tmp_path / where).read_text("utf-8") == text


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
