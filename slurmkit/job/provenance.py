"""What git says about files: the commit they are in, and how they differ from it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurmkit.errors import Failure

# Seconds. Status of a large repository on a slow shared file system takes a few.
_DEADLINE = 60
# Set while git runs a hook, and about that hook's repository instead of the file's.
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
# The word for a file of which git stores only the path that it points to.
SYMBOLIC_LINK = "symbolic link"
# https://git-scm.com/docs/git-status: the letters of the short format, in the words of the long one.
_WORDS = {"M": "modified", "A": "new file", "D": "deleted", "T": "typechange", "U": "unmerged"} | {
    "?": "untracked",
    "!": "ignored",
}


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository. Example: Repository(Path("/home/me/project"), "3923d18…"); no commit yet is None."""

    root: Path
    commit: str | None

    def changes(self, *paths: Path) -> dict[Path, str]:
        """How tracked files differ from the last commit; with `paths`, only those, and untracked or ignored ones too.

        Example: {Path("/home/me/project/a.yaml"): "modified"}.
        """
        scope = ["--untracked-files=all", "--ignored", "--", *map(str, paths)] if paths else []
        listed = _git(self.root, "status", "--porcelain=v2", "-z", "--no-renames", *(scope or ["--untracked-files=no"]))
        found = {}
        for entry in _succeeded(listed).decode(errors="surrogateescape").split("\0"):
            kind, _, rest = entry.partition(" ")
            if kind in ("?", "!"):
                found[self.root / rest] = _WORDS[kind]
            elif kind in ("1", "u"):
                letters = rest[:2].replace(".", "")
                found[self.root / rest.split(" ", 7 if kind == "1" else 9)[-1]] = _WORDS[letters[-1]]
        return found

    def not_committed(self, *paths: Path) -> dict[Path, str]:
        """Those of `paths` that are not as the last commit has them, in the words of `git status`."""
        words = self.changes(*paths)
        for path in paths:
            if path.is_symlink():
                words.setdefault(path, SYMBOLIC_LINK)
        # Git can be told to take a file as unchanged, so its bytes are compared, too.
        return {path: words.get(path, "modified") for path in paths if path in words or path.read_bytes() != blob(path)}


def repository_of(folder: Path) -> Repository | None:
    """The repository that a folder lies in, or None. Failure where git refuses to read it."""
    found = _git(folder, "rev-parse", "--show-toplevel")
    if found is None or (found.returncode and b"not a git repository" in found.stderr):
        return None
    root = Path(os.fsdecode(_succeeded(found).removesuffix(b"\n")))
    head = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    return Repository(root, head.stdout.decode().strip() if head and not head.returncode else None)


def checkout_of(file: Path) -> Repository | None:
    """The repository that tracks a file; a file that merely lies in one, such as an installed package, has none."""
    listed = _git(file.parent, "ls-files", "--", file.name)
    return repository_of(file.parent) if listed and not listed.returncode and listed.stdout else None


def blob(file: Path, commit: str = "HEAD") -> bytes | None:
    """A file's bytes as a commit holds them; None where it does not."""
    found = _git(file.parent, "cat-file", "blob", f"{commit}:./{file.name}")
    return found.stdout if found and not found.returncode else None


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes] | None:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1"}
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DEADLINE,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise Failure(f"git {arguments[0]} gave no answer about {folder} within {_DEADLINE} s") from None


def _succeeded(done: subprocess.CompletedProcess[bytes] | None) -> bytes:
    if done is None:
        raise Failure("git is not on PATH")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise Failure(f"{' '.join(map(str, done.args[3:5]))} in {done.args[2]}: {said}")
    return done.stdout
