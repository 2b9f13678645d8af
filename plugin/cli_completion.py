"""The command `completion`: a script that teaches a shell our commands, options and names.

Knows options and output. The work is in `superego.completion`.
"""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a SHELL: commands, options, personas and bases.

    \b
    bash (4.4 or newer):
      superego completion bash > ~/.local/share/bash-completion/completions/superego
    zsh (a folder of $fpath, named before compinit in ~/.zshrc):
      superego completion zsh > ~/.zfunc/_superego
    fish:
      superego completion fish > ~/.config/fish/completions/superego.fish

    Make the folder first if there is none. For the running shell alone:
    eval "$(superego completion bash)".
    """
    from superego.completion import VARIABLE, shells

    main = context.find_root().command
    click.echo(shells()[shell](main, {}, "superego", VARIABLE).source())
