"""The scripts that complete the command line in bash, zsh and fish.

    python -m oodcli.cli.shells DIR

writes them into DIR; those of the repository are in ``completions/``. What they ask and are
answered is said in :mod:`.completions`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

_HEAD = "# Made by: python -m oodcli.cli.shells completions\n"

_BASH = (
    _HEAD
    + r"""# To be read by ~/.bashrc (source oodcli.bash), or to lie in
# ~/.local/share/bash-completion/completions as oodcli.

_oodcli() {
    local line=${COMP_LINE:0:COMP_POINT} answer word about path='' suffix found index
    local typed='' breaks='' offered=() paths=() IFS=$' \t\n'
    while IFS= read -r answer; do
        word=${answer%%$'\t'*} about=
        [[ $answer == *$'\t'* ]] && about=${answer#*$'\t'}
        if [[ $word != *'<files>' ]]; then
            [[ -n $word ]] && offered+=("$word")
            continue
        fi
        typed=${word%'<files>'} path=$typed
        [[ $about == '='* ]] && path=${typed#*=} about=${about#=}
        while IFS= read -r found; do
            if [[ ! -d ${found/#\~/$HOME} ]]; then
                for suffix in ${about:-''}; do
                    [[ $found == *"$suffix" ]] && break
                done
                [[ $found == *"$suffix" ]] || continue
            fi
            paths+=("$found")
        done < <(compgen -f -- "$path")
    done < <(_OODCLI_COMPLETE=complete_bash _OODCLI_LINE=$line "${1/#\~/$HOME}" 2>/dev/null)
    if (( ${#offered[@]} == 0 )); then
        # Bash puts quotes around what needs them, and a slash behind folders.
        compopt -o filenames 2>/dev/null
    else
        for index in "${!paths[@]}"; do
            found=${paths[index]/#\~/$HOME}
            printf -v 'paths[index]' %q "${paths[index]}"
            paths[index]=${paths[index]/#\\\~/\~}
            [[ -d $found ]] && paths[index]+=/
        done
        (( ${#offered[@]} + ${#paths[@]} == 1 )) && [[ $offered == *: ]] &&
            compopt -o nospace 2>/dev/null
    fi
    # Readline replaces what follows the last ':' or '=' that is not in quotes.
    for index in "${!paths[@]}"; do
        paths[index]=${typed%"$path"}${paths[index]}
    done
    COMPREPLY=("${offered[@]}" "${paths[@]}")
    typed=${typed:-${line##*[[:space:]]}}
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=:
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+==
    if [[ -n $breaks && $typed == *[$breaks]* && $2 != *[$breaks]* ]]; then
        typed=${typed%"${typed##*[$breaks]}"}
        for index in "${!COMPREPLY[@]}"; do
            COMPREPLY[index]=${COMPREPLY[index]#"$typed"}
        done
    fi
}

complete -o nosort -F _oodcli oodcli
"""
)

_ZSH = (
    "#compdef oodcli\n"
    + _HEAD
    + r"""# To lie in a folder of $fpath as _oodcli, before compinit.

_oodcli() {
    local answer word about suffix
    local -a offered open suffixes
    local files=
    for answer in ${(f)"$(_OODCLI_COMPLETE=complete_zsh _OODCLI_LINE="${(j: :)words[1,CURRENT]}" \
        ${(Q)~words[1]} 2>/dev/null)"}; do
        word=${answer%%$'\t'*} about=
        [[ $answer == *$'\t'* ]] && about=${answer#*$'\t'}
        if [[ $word == *'<files>' ]]; then
            files=yes suffixes=(${=about})
        elif [[ $word == *: ]]; then
            open+=($word)
        else
            offered+=("${word//:/\\:}${about:+:$about}")
        fi
    done
    [[ $PREFIX == -*=* ]] && compset -P '*='
    (( $#offered )) && _describe -V oodcli offered
    (( $#open )) && compadd -S '' -a open
    [[ -z $files ]] && return
    if [[ $suffixes[1] == '=' ]]; then
        compset -P '*='
        shift suffixes
    fi
    if [[ $suffixes[1] == / ]]; then
        _files -/
    elif (( $#suffixes )); then
        _files -g "*(${(j:|:)suffixes})(-.)"
    else
        _files
    fi
}

if [[ $funcstack[1] == _oodcli ]]; then
    _oodcli "$@"
else
    compdef _oodcli oodcli
fi
"""
)

_FISH = (
    _HEAD
    + r"""# To lie in ~/.config/fish/completions as oodcli.fish.

function __oodcli
    set -l program (string replace -r -- '^~(?=/)' $HOME (commandline -opc)[1])
    set -l option (string match -r -- '^-[^=]*=' (commandline -ct))
    set -lx _OODCLI_COMPLETE complete_fish
    set -lx _OODCLI_LINE (commandline -cp)
    for answer in ($program 2>/dev/null)
        set -l parts (string split -m 1 \t -- $answer)
        if not string match -q -- '*<files>' $parts[1]
            printf '%s%s\t%s\n' "$option" $parts[1] "$parts[2]"
            continue
        end
        set -l typed (string replace -r -- '<files>$' '' $parts[1])
        set -l before
        set -l suffixes (string split -n ' ' -- $parts[2])
        if test "$suffixes[1]" = '='
            set before (string match -r -- '^[^=]*=' $typed)
            set typed (string replace -r -- '^[^=]*=' '' $typed)
            set -e suffixes[1]
        end
        for path in (__oodcli_paths "$typed")
            if test (count $suffixes) = 0; or string match -q -- '*/' $path
                printf '%s%s%s\n' "$option" "$before" $path
                continue
            end
            for suffix in $suffixes
                if test $suffix != /; and string match -q -- "*$suffix" $path
                    printf '%s%s%s\n' "$option" "$before" $path
                    break
                end
            end
        end
    end
end

# Files and folders that begin so, the latter with a slash.
function __oodcli_paths
    set -l home (string match -r -- '^~(?=/)' $argv[1])
    set -l typed (string replace -r -- '^~(?=/)' $HOME $argv[1])
    for path in $typed*
        test -d $path; and set path $path/
        test -n "$home"; and set path (string replace -- $HOME '~' $path)
        echo $path
    end
end

complete --command oodcli --no-files --arguments '(__oodcli)'
"""
)

SCRIPTS: Mapping[str, tuple[str, str]] = {
    "bash": ("oodcli.bash", _BASH),
    "zsh": ("_oodcli", _ZSH),
    "fish": ("oodcli.fish", _FISH),
}
"""Shell → name of its script, and the script."""


def script(shell: str) -> str:
    """For a shell that we have no script for, typer's. Raises typer.Exit where it has none."""
    if shell in SCRIPTS:
        return SCRIPTS[shell][1]
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    found: str = get_completion_script(
        prog_name="oodcli", complete_var="_OODCLI_COMPLETE", shell=shell
    )
    return found + "\n"


def install() -> Path:
    """Puts the script where the shell in use looks for it. Returns its path. Raises typer.Exit for
    an unknown shell."""
    from typer.completion import install  # type: ignore[attr-defined]

    shell, path = install(prog_name="oodcli")
    if shell in SCRIPTS:
        path.write_text(script(shell), encoding="utf-8")
    where: Path = path
    return where


def write(folder: Path) -> None:
    """All scripts of ours. Raises OSError when the disk refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in SCRIPTS.values():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
