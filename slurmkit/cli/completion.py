"""slurmkit completion"""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options, runs and job ids.

    bash: eval "$(slurmkit completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: slurmkit completion fish
    >~/.config/fish/completions/slurmkit.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "slurmkit", "_SLURMKIT_COMPLETE").source())
