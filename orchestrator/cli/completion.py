"""The verb `completion`: the script that makes a shell complete verbs, options, names of models and indices of GPUs.

zsh's and fish's are click's. bash's is our own: bash ends a word at a colon, which names may hold, so its words are read from the line.
"""

import click

from orchestrator.cli import options, screen

PROGRAM = "orchestratorctl"
VARIABLE = "_ORCHESTRATORCTL_COMPLETE"
BASH = f"""\
_{PROGRAM}_completion() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" type value colons="" at
    local word="${{line##*[[:space:]]}}"
    local -a words
    IFS=$' \\t\\n' read -ra words <<< "$line"
    at=${{#words[@]}}
    [[ -n $word ]] && at=$((at - 1))
    # What stands before the last colon is on the line already, and stays.
    [[ $word == *:* && $COMP_WORDBREAKS == *:* ]] && colons="${{word%"${{word##*:}}"}}"
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            plain) COMPREPLY+=("${{value#"$colons"}}") ;;
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
        esac
    done < <(COMP_WORDS="$line" COMP_CWORD=$at {VARIABLE}=bash_complete "$1" 2> /dev/null)
}}
complete -o nosort -F _{PROGRAM}_completion {PROGRAM}
"""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@options.shared
def completion(shell: str) -> None:
    """Print the script that completes verbs, options and names at TAB.

    Names of models and indices of GPUs are asked of the daemon; where none answers within 0.3 s there are none, and nothing is said.

    \b
    Examples, for this shell:
      source <(orchestratorctl completion bash)
      source <(orchestratorctl completion zsh)                 # after compinit
      orchestratorctl completion fish | source

    \b
    For all that come:
      orchestratorctl completion bash > ~/.local/share/bash-completion/completions/orchestratorctl
      orchestratorctl completion zsh > "${fpath[1]}/_orchestratorctl"
      orchestratorctl completion fish > ~/.config/fish/completions/orchestratorctl.fish
    """
    if shell == "bash":
        return screen.out(BASH, newline=False)
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    screen.out(found(click.get_current_context().find_root().command, {}, PROGRAM, VARIABLE).source())
