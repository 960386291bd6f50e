"""Jinja2 with slurmkit's rules, for templates that anybody may have written.

Whatever a template puts out is shell-quoted unless the template asked for `| raw`, also where the two are joined. A
template reaches the data that it is given and nothing else: no file, no clock, no random number, no Python internals.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import (
    BaseLoader,
    BytecodeCache,
    FileSystemLoader,
    StrictUndefined,
    TemplateNotFound,
    TemplateSyntaxError,
    Undefined,
    nodes,
)
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from slurmkit.config.section import Section
from slurmkit.job.values import shell_word

# Seconds and bytes that one rendering may take. Ours takes some ten milliseconds.
DEADLINE = 10
_MEMORY = 1 << 30
# The rest of Jinja2's filters make HTML, or text of any object, or a random choice.
_FILTERS = (
    *("abs", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "indent", "int", "items"),
    *("last", "length", "list", "map", "max", "min", "reject", "rejectattr", "round", "select", "selectattr", "slice"),
    *("sort", "unique"),
)
_GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")


def quote(value: Any) -> Markup:
    """A value as one shell word; text that is code already stays as it is. TypeError for what is neither."""
    if isinstance(value, Undefined):
        str(value)  # a StrictUndefined raises here, with the name that is missing
    if isinstance(value, Markup):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"a template puts out {value!r}: only text and whole numbers can stand in a script")
    return Markup(shell_word(str(value)))


def _concat(values: Iterable[Any], separator: str = "") -> str:
    """Plain text if all parts are; where one is code, the others are quoted, and the separator unless it is a space."""
    parts = [*values]
    quoted = [quote(part) for part in parts]
    if not any(isinstance(part, Markup) for part in parts):
        return str(separator).join(map(str, parts))
    between = separator if isinstance(separator, Markup) or not separator.strip() else quote(separator)
    return Markup(str(between).join(map(str, quoted)))


def _string(value: Any) -> str:
    """The text of a number or of a section of the spec; that of any other object could hold an address in memory."""
    return str(value) if isinstance(value, Section) else value if isinstance(value, Markup) else _concat([value])


def _replace(text: str, old: str, new: str) -> str:
    """`{{ super() | replace(old, new) }}`: `new` is quoted in code, unless it is raw."""
    if isinstance(text, Markup):
        return Markup(str.replace(text, str(old), str(quote(new))))
    return str.replace(text, old, new)


class _OurConcat(NodeTransformer):
    """Jinja2's own ~ escapes for HTML where one part is code."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "concat", [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment in which templates render. See the module's text."""

    intercepted_binops = frozenset({"+", "%", "*", "**"})

    def __init__(self, loader: BaseLoader, filters: dict[str, Any], compiled: BytecodeCache | None = None) -> None:
        super().__init__(
            loader=loader,
            bytecode_cache=compiled,
            undefined=StrictUndefined,
            # Autoescape marks the output of blocks and macros, so that `finalize` can tell it from a value.
            autoescape=True,
            finalize=quote,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.filters = {name: FILTERS[name] for name in _FILTERS}
        self.filters |= {"upper": str.upper, "lower": str.lower, "trim": str.strip}
        self.filters |= {"string": _string, "concat": _concat, "join": _concat, "replace": _replace, **filters}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of a section what its own class has, no str.format, and no method of code, which is HTML's."""
        if isinstance(obj, Section) and hasattr(Section, attr):
            return False
        return not isinstance(obj, Markup) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Refuse str.format, whose text could be any object's; `~` joins."""
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise SecurityError("str.format is not for templates: join text with ~")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers, and + on text and lists. Code is joined with ~, which quotes what is not."""
        numbers = all(isinstance(value, int | float) for value in (left, right))
        if operator == "**" or (operator in "%*" and not numbers):
            raise SecurityError(f"{operator} is not for templates" if numbers else f"{operator} is for numbers alone")
        if isinstance(left, Markup) or isinstance(right, Markup):
            raise SecurityError("+ does not quote: join code and values with ~")
        return super().call_binop(context, operator, left, right)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        """Compile a template that was read, unless its blocks go nowhere."""
        _check_inheritance(self, source, str(name), str(filename))
        ours = _OurConcat().visit(source).set_environment(self)
        return super()._generate(ours, name, filename, defer_init)


class Folder(FileSystemLoader):
    """A folder of templates. What cannot be read is an error and not a reason to look elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path

    def get_source(self, environment: Any, template: str) -> Any:
        """See FileSystemLoader. TemplateSyntaxError with file and line for a file that is no text, or no file."""
        path = self.path.joinpath(*[part for part in template.split("/") if part not in ("", "..")])
        fault = partial(TemplateSyntaxError, name=template, filename=str(path))
        if not template.endswith(".j2"):
            raise SecurityError(f"{template}: a template's name ends in .j2")
        if path.is_symlink() or path.exists():
            try:
                path.read_bytes().decode()
            except UnicodeDecodeError as error:
                line = error.object[: error.start].count(b"\n") + 1
                raise fault(f"not UTF-8: {error.reason}", line) from None
            except OSError as error:
                raise fault(f"cannot be read: {error.strerror}", 1) from None
        return super().get_source(environment, template)


def _check_inheritance(environment: Sandbox, tree: nodes.Template, name: str, filename: str) -> None:
    """An extending template holds blocks of its parents and nothing beside them: the rest would be lost in silence."""
    extends = tree.find(nodes.Extends)
    if extends is None:
        return
    known: dict[str, int] = {}
    seen = {filename}
    parent: nodes.Extends | None = extends
    while parent is not None:
        if not isinstance(parent.template, nodes.Const):
            raise TemplateSyntaxError("extends needs a template's name in quotes", parent.lineno, name, filename)
        assert environment.loader is not None
        try:
            text, above, _ = environment.loader.get_source(environment, parent.template.value)
        except TemplateNotFound as error:  # which would send the loader to the next folder, past this file
            raise TemplateSyntaxError(f"there is no template {error}", parent.lineno, name, filename) from None
        if above in seen:
            raise TemplateSyntaxError(
                f"extends itself, by way of {parent.template.value!r}: slurmkit/{name} is the packaged file and "
                f"site/{name} the site's",
                extends.lineno,
                name,
                filename,
            )
        seen.add(str(above))
        above_tree = environment.parse(text, parent.template.value, above)
        known |= {block.name: block.lineno for block in above_tree.find_all(nodes.Block)}
        parent = above_tree.find(nodes.Extends)
    for node in tree.body:
        if isinstance(node, nodes.Block) and node.name not in known:
            from difflib import get_close_matches

            close = get_close_matches(node.name, known, n=1)
            raise TemplateSyntaxError(
                f"the block {node.name!r} overrides nothing; "
                + (f"the nearest is {close[0]!r}" if close else f"there are {', '.join(known)}"),
                node.lineno,
                name,
                filename,
            )
        lost = [line for part in node.nodes for line in _lines_of(part)] if isinstance(node, nodes.Output) else []
        if isinstance(node, nodes.Include | nodes.If | nodes.For | nodes.CallBlock | nodes.FilterBlock):
            lost = [node.lineno]
        if lost:
            raise TemplateSyntaxError("stands outside of all blocks, and would be lost", lost[0], name, filename)


def _lines_of(part: nodes.Node) -> list[int]:
    """Where a part of a template puts something out; nowhere if it is blank."""
    if not isinstance(part, nodes.TemplateData):
        return [part.lineno]
    blank = len(part.data) - len(part.data.lstrip())
    return [part.lineno + part.data[:blank].count("\n")] if part.data.strip() else []


@contextmanager
def bounded() -> Iterator[None]:
    """Limits on time and memory, so that no template holds a login node up. They are a process's: main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise SecurityError(f"takes more than {DEADLINE} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        signal.setitimer(signal.ITIMER_REAL, DEADLINE)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
