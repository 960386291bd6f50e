"""Environment variables that a job cannot set: those of the rendered script, of Slurm and of bash."""

from __future__ import annotations

import re

# The rendered script sets these after it has exported the job's own variables.
_OF_THE_SCRIPT = re.compile(
    r"RAY_ADDRESS|RAY_AUTH_MODE|RAY_AUTH_TOKEN|RAY_AUTH_TOKEN_PATH|RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    r"|RAY_health_check_(?:period_ms|timeout_ms|failure_threshold)|PYXIS_\w*"
)
# Variables that bash sets, cannot change, or obeys (bash(1), "Shell Variables"). TMOUT ends `read` in the script.
_OF_BASH = re.compile(
    r"_|BASH\w*|E?UID|PPID|GROUPS|SHELLOPTS|SHLVL|PWD|OLDPWD|SECONDS|EPOCH(?:REALTIME|SECONDS)|S?RANDOM|LINENO|FUNCNAME"
    r"|FUNCNEST|DIRSTACK|PIPESTATUS|HISTCMD|COMP_\w+|COMPREPLY|COPROC|MAPFILE|REPLY|OPTARG|OPTERR|OPTIND|READLINE_\w+"
    r"|IFS|CDPATH|GLOBIGNORE|EXECIGNORE|POSIXLY_CORRECT|PS4|TMOUT|TIMEFORMAT"
)


def reserved(name: str) -> str | None:
    """Why a job cannot set this variable, and the alternative; None if it can."""
    if name.upper().startswith("SK_"):
        return "belongs to slurmkit, as every name that begins with sk_: choose another name"
    if name.startswith(("SLURM", "SBATCH_", "SRUN_")):
        return "belongs to Slurm: choose another name, or set an option of sbatch with --set sbatch.OPTION=VALUE"
    if _OF_THE_SCRIPT.fullmatch(name):
        return "is set by the job's script itself: leave it out"
    if _OF_BASH.fullmatch(name):
        return "belongs to bash, which runs the job's script: choose another name"
    if name == "PATH":
        return "would replace the whole PATH: add to it with a line of setup, export PATH=/opt/tool/bin:$PATH"
    return None
