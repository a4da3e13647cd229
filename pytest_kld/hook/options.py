"""The flags of an engine's release, read from its source: importing its parser takes seconds and a working torch.

Releases declare flags in three ways, some in several: `parser.add_argument("--tp-size", "--tp", dest=…)`; annotated
fields of a class, `tp_size: A[int, Arg(help=…, aliases=["--tp"])]`, whose name gives the flag; and plain fields of
certain classes, `max_log_len: int | None = None`. Standard library only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path


def read_options(
    root: Path, sources: Iterable[str], known_flag: str, *, classes: str | None = None
) -> dict[str, tuple[str, str]] | None:
    """Return each flag's first spelling and the field that it sets; None if they cannot be read.

    An entry is `"--tensor-parallel-size": ("--tp-size", "tp_size")`. Two flags with the same first spelling mean the
    same. Two flags that set the same field may differ, such as `--disable-x` and `--enforce-x`.

    Args:
        root: the directory of the engine's package.
        sources: patterns of the files in it that declare flags.
        known_flag: a flag that every release has: a table without it was misread.
        classes: the end of the names of classes whose plain fields are flags.

    """
    found: dict[str, tuple[str, str]] = {}
    try:
        for pattern in sources:
            for path in sorted(root.glob(pattern)):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                for spellings, field in (*_plain_fields(tree, classes), *map(_declared, ast.walk(tree))):
                    found.update(dict.fromkeys(spellings, (spellings[0], field)) if spellings else {})
    except (OSError, SyntaxError, ValueError):
        return None
    return dict(sorted(found.items())) if known_flag in found else None


def _plain_fields(tree: ast.Module, classes: str | None) -> Iterator[tuple[list[str], str]]:
    """Yield the flags of classes whose fields are their flags."""
    for declared in tree.body:
        if classes is not None and isinstance(declared, ast.ClassDef) and declared.name.endswith(classes):
            for node in declared.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    yield [f"--{node.target.id.replace('_', '-')}"], node.target.id


def _declared(node: ast.AST) -> tuple[list[str], str]:
    """Return the spellings that a node declares, and their field."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
        flags = [flag for argument in node.args if (flag := _text(argument)) and flag.startswith("-") and flag != "-"]
        first = next((flag for flag in flags if flag.startswith("--")), "")
        return flags, _text(_keywords(node).get("dest")) or first.removeprefix("--").replace("-", "_")
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return list(_field(node.target.id, node.annotation)), node.target.id
    return [], ""


def _field(name: str, annotation: ast.expr) -> Iterator[str]:
    """Read `A[type, "help"]` and `A[type, Arg(help=…, cli_name=…, aliases=[…])]`."""
    if not (isinstance(annotation, ast.Subscript) and _name(annotation.value) in ("A", "Annotated")):
        return
    parts = annotation.slice.elts[1:] if isinstance(annotation.slice, ast.Tuple) else []
    call = next((part for part in parts if isinstance(part, ast.Call) and _name(part.func) == "Arg"), None)
    keywords = {} if call is None else _keywords(call)
    if not parts or "no_cli" in keywords:
        return
    yield _text(keywords.get("cli_name")) or f"--{name.replace('_', '-')}"
    aliases = keywords.get("aliases")
    if isinstance(aliases, ast.List | ast.Tuple):
        yield from (alias for element in aliases.elts if (alias := _text(element)))


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
