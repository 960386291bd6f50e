"""Which run is meant: by its name in the results folder, by its path, or by the id of one of its jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from slurmkit.errors import Failure, UserError
from slurmkit.run.directory import jobs_of

_JOB_ID = re.compile(r"(\d+)(?:[_+]\S+)?")


def results_folder(directory: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where `submit` puts a run that is submitted from `directory`: ./results, if nothing says otherwise."""
    from slurmkit.job.layers import read_layers, site_file

    found = None
    if (site := site_file(environ)) is not None:
        from slurmkit.job.site import read_site

        found = read_site(site).rules.defaults.get("results_dir")
    for layer in read_layers(None, directory, environ):
        found = layer.source.data.get("results_dir", found)
    return Path(found) if isinstance(found, str) else directory / "results"


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "run.json").is_file() or (path / "attempts").is_dir()


def runs_in(results: Path) -> list[Path]:
    """All run directories in a folder, by name; none where there is no such folder."""
    try:
        return sorted(path for path in results.iterdir() if not path.name.startswith(".") and is_run(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Failure(f"{results} cannot be read: {error.strerror}") from None


def find_run(text: str, results: Path) -> Path:
    """The run directory that `text` names. UserError with the nearest names where there is none."""
    if (path := _named(text, results)) is not None:
        return path
    runs = runs_in(results)
    if found := _JOB_ID.fullmatch(text):
        for path in runs:
            if found[1] in jobs_of(path):
                return path.absolute()
        if (elsewhere := _run_of_job(found[1])) is not None:
            return elsewhere
    import difflib

    names = [path.name for path in runs]
    near = difflib.get_close_matches(text, names, 5, 0.4)
    near += [name for name in names if text.lower() in name.lower() and name not in near]
    raise UserError(
        f"{text}: no run of that name in {results}, no run directory, and no job of one; "
        + (f"the nearest are {', '.join(near[:5])}" if near else "slurmkit ls lists the runs")
    )


def find_job(text: str, results: Path) -> str:
    """Return the job id that `text` is, or that of the newest job of the run that it names.

    The job of an id need not be in any run directory here. A follow-up that has not begun is not counted.
    """
    run = _named(text, results)
    if run is None and _JOB_ID.fullmatch(text):
        return text
    from slurmkit.run.attempts import RunFiles

    run = run or find_run(text, results)
    files = RunFiles(run)
    jobs = [job for job in files.order if job.isdigit()]
    jobs += [attempt.job_id for attempt in files.attempts if attempt.job_id and attempt.task is None]
    if not jobs:
        raise UserError(f"{run}: nothing to compare, no job of this run was submitted to Slurm")
    return max(jobs, key=int)


def _named(text: str, results: Path) -> Path | None:
    return next((path.absolute() for path in (results / text, Path(text)) if is_run(path)), None)


def _run_of_job(job_id: str) -> Path | None:
    """The run directory of a job elsewhere, from its script in Slurm, where there is a Slurm."""
    from slurmkit.run.verify import run_dir_in
    from slurmkit.slurm.connect import connect

    try:
        path = run_dir_in(connect().script_of(job_id))
    except (Failure, UserError):
        return None
    return path if path is not None and is_run(path) else None
