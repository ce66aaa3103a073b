# Made by: python -m oodcli.cli.shells completions
# To lie in ~/.config/fish/completions as oodcli.fish.

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
