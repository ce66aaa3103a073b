# Made by: python -m oodcli.cli.shells completions
# To be read by ~/.bashrc (source oodcli.bash), or to lie in
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
