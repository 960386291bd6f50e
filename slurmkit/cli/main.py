"""The `slurmkit` command: one module per subcommand, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from slurmkit import __version__
from slurmkit.errors import SlurmkitError

# Listed by hand, so that `slurmkit --help` imports none of them.
_COMMANDS = {
    "run": "Train on this machine, without Slurm.",
    "submit": "Render one sbatch file, submit it, and say how to follow it.",
    "status": "Tell how runs stand, and why.",
    "top": "Watch all runs.",
    "wait": "Wait until a run has ended for good, and exit with its code.",
    "cancel": "Cancel runs, follow-ups included.",
    "ls": "List all runs.",
    "watch": "Watch one run until it ends, and exit with its code.",
    "report": "Write one page of a run, or of several beside each other.",
    "usage": "Tell what a run has used up, and how much of it for its steps.",
    "sync": "Upload what runs have logged for W&B offline.",
    "export": "Write a checkpoint's model to a folder that transformers and vLLM open.",
    "evaluate": "Tell whether training helped: an environment's validation, or BFCL v3.",
    "render": "Print or write the sbatch file that submit would submit.",
    "logs": "Show what a run's command has written, and go on as it grows.",
    "attach": "Open a shell inside a running job, in its container.",
    "config": "Print the settled job, and where each value comes from.",
    "site": "Write and check the file that holds a site's defaults and rules.",
    "doctor": "Check this machine, or nodes of a cluster, for what a job needs.",
    "check": "Tell whether written sbatch files are still what rendering makes of their sources.",
    "cleanup": "End and remove what dead runs of yours left on this machine.",
    "verify": "Compare a job's script in Slurm with the files on disk and in git.",
    "templates": "See and check the templates that jobs are rendered from.",
    "bench": "Measure the trainer.",
    "data": "Make tasks to train on.",
    "completion": "Print what makes a shell complete commands, runs and job ids.",
}


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"slurmkit.cli.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slurmkit")
def cli() -> None:
    """One readable sbatch file, Ray on every allocated node, GRPO until the model is trained."""


def _shown(message: str) -> str:
    """Return an error's message without tokens: a value that was typed into the wrong place may be one."""
    from slurmkit.job.secrets import without_tokens

    return without_tokens(message)


def main() -> None:
    """Entry point. Errors that have a name end with one message: exit 2 for the user's, 1 for a failure."""
    try:
        sys.exit(cli.main(prog_name="slurmkit", standalone_mode=False))
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        vars(error)["message"] = _shown(error.message)
        error.show()
        sys.exit(error.exit_code)
    except SlurmkitError as error:
        click.echo(f"error: {_shown(str(error))}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
