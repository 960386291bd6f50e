"""The options that describe a job, shared by the commands that take one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from slurmkit.cli import completers
from slurmkit.cli.slurm_options import explain, refuse_misread_letters
from slurmkit.errors import UserError
from slurmkit.job.settle import Request

Function = TypeVar("Function", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_SLURM = [
    click.option("--nodes", "-N", type=int, help="Number of nodes."),
    click.option("--time", "-t", help="Time limit: minutes, h:mm:ss or d-hh:mm:ss."),
    click.option("--partition", "-p", help="Partition.", shell_complete=completers.partitions),
    click.option("--account", "-A", help="Account to charge.", shell_complete=completers.accounts),
    click.option("--qos", help="Quality of service."),
    click.option("--gres", help="Generic resources per node, such as gpu:h100:8."),
    click.option("--gpus-per-node", help="GPUs per node: 8 or h100:8."),
    click.option("--gpus", "-G", help="GPUs of the whole job: 16 or h100:16."),
    click.option("--cpus-per-task", type=int, help="CPUs on each node."),
    click.option("--mem", help="Memory per node, such as 64G."),
    click.option("--constraint", "-C", help="Node features."),
    click.option("--exclusive", is_flag=True, default=None, help="Whole nodes."),
    click.option("--nodelist", "-w", help="Nodes that must be among those of the job."),
    click.option("--exclude", "-x", help="Nodes that must not be among those of the job."),
    click.option("--reservation", help="Reservation to run in."),
    click.option("--licenses", "-L", help="Licenses, such as matlab:2."),
    click.option("--dependency", "-d", help="Jobs to wait for, such as afterok:123."),
    click.option("--mail-type", help="Events that send mail, such as END,FAIL."),
    click.option("--mail-user", help="Who gets the mail."),
    click.option("--comment", help="A comment that Slurm stores with the job."),
    click.option("--until-done", is_flag=True, default=None, help="Go on in follow-up jobs until the run is complete."),
    click.option("--max-attempts", type=int, help="Attempts of --until-done in all.  [default: 20]"),
    click.option("--max-hours", type=float, help="Hours after which --until-done begins no other attempt."),
]
_COMMON = [
    click.option("--config", "-c", type=_PATH, help="Training configuration for slurmkit's own trainer."),
    click.option("--resume", metavar="never|auto|PATH", help="Where training goes on: checkpointing.resume."),
    click.option("--name", "-n", help="Name of the run and of its directory."),
    click.option("--results-dir", type=_PATH, help="Where run directories are made.  [default: ./results]"),
    click.option("--env", "env", multiple=True, metavar="NAME=VALUE", help="Set an environment variable. Repeatable."),
    click.option(
        "--secret",
        "secrets",
        multiple=True,
        metavar="NAME[=SOURCE]",
        help="Carry an exported variable to the job, or env:VARIABLE, file:PATH or command:COMMAND. Repeatable.",
    ),
    click.option(
        "--profile",
        help="Lay this profile of a project's, your own or the site's file over its defaults.",
        shell_complete=completers.profiles,
    ),
    click.option(
        "--set",
        "keys",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set any other key of the job. Repeatable.",
        shell_complete=completers.keys,
    ),
]
_CONTAINER = [
    click.option("--image", help="Image of the job's container: container.image."),
    click.option(
        "--mount",
        "mounts",
        multiple=True,
        metavar="SRC[:DST[:ro]]",
        help="Mount in the container, in place of container.mounts. Repeatable.",
    ),
]


class JobCommand(click.Command):
    """A command whose line may end in `-- COMMAND ARG…`, taken exactly as typed."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Cut at the first `--`, which click would swallow."""
        cut = args.index("--") if "--" in args else len(args)
        context.meta["command"] = tuple(args[cut + 1 :])
        if cut == len(args) - 1:
            raise UserError("nothing follows --: write the command that the job runs after it")
        refuse_misread_letters(args[:cut])
        try:
            return super().parse_args(context, args[:cut])
        except click.NoSuchOption as error:
            raise explain(error, any(option.name == "nodes" for option in self.params)) from None

    def collect_usage_pieces(self, context: click.Context) -> list[str]:
        """Show what the line may end in."""
        return ["[OPTIONS]", "[RUN_FILE]", "[KEY=VALUE]...", "[-- COMMAND...]"]


def job_options(slurm: bool) -> Callable[[Function], Function]:
    """Options of a command that takes a job; `slurm` adds those that only a queue understands."""

    def decorate(function: Function) -> Function:
        function = click.argument("words", nargs=-1, type=str)(function)
        for option in reversed([*_COMMON, *([*_SLURM, *_CONTAINER] if slurm else [])]):
            function = option(function)
        return function

    return decorate


def request_from(context: click.Context, words: tuple[str, ...], options: dict[str, Any]) -> Request:
    """Return the request of a command line. Reads no file."""
    run_files = [word for word in words if "=" not in word and not word.startswith("~")]
    if len(run_files) > 1:
        raise UserError(f"one run file at most, not {' and '.join(run_files)}; a command goes after --")
    elsewhere = ("config", "env", "keys", "profile", "resume", "secrets", "mounts")
    flags = {name: value for name, value in options.items() if value is not None and name not in elsewhere}
    for name, key in (("until_done", "enabled"), ("max_attempts", "max_attempts"), ("max_hours", "max_hours")):
        if name in flags:
            flags[f"until_done.{key}"] = flags.pop(name)
    for name, key in (("licenses", "sbatch.licenses"), ("image", "container.image")):
        if name in flags:
            flags[key] = flags.pop(name)
    if options.get("mounts"):
        flags["container.mounts"] = list(options["mounts"])
    flags |= {f"secrets.{name}": source for name, source in map(_secret, options["secrets"])}
    if "results_dir" in flags:
        flags["results_dir"] = str(flags["results_dir"].absolute())
    for name, text in _pairs("--env", options["env"]):
        flags[f"env.{name}"] = text
    for key, text in _pairs("--set", options["keys"]):
        from slurmkit.config.yaml12 import parse_value

        try:
            flags[key] = parse_value(text)
        except ValueError as error:
            raise UserError(f"--set {key}={text}: not a YAML value: {error}") from None
    return Request(
        run_file=Path(run_files[0]) if run_files else None,
        config=options["config"],
        overrides=tuple(word for word in words if word not in run_files),
        command=context.meta["command"],
        flags=flags,
        profile=options["profile"],
        resume=options["resume"],
    )


def _secret(text: str) -> tuple[str, str | dict[str, str]]:
    """Return a secret's name and where its value comes from. No message shows the text, which may be the value."""
    name, equals, source = text.partition("=")
    kind, colon, where = source.partition(":")
    if not name or (equals and (kind not in ("env", "file", "command") or not colon)):
        raise UserError("--secret: write NAME, NAME=env:VARIABLE, NAME=file:PATH or NAME=command:COMMAND, not a value")
    return name, {kind: where} if equals else "env"


def _pairs(option: str, texts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise UserError(f"{option} {text!r}: write NAME=VALUE")
        yield name, value
