"""`pytest-kld cache`: what the cache holds, whether it is intact, and how to make room."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_kld.command.output import Exit, Failed, Stderr, as_json, cache_option, print_json, print_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.inventory import Entry

_DAY = 24 * 3600


@click.group()
def cache() -> None:
    """List, verify, prune, export and import captures and scores."""


@cache.command()
@cache_option
def path(root: Path) -> None:
    """Print the cache directory."""
    print_lines([str(root)])


@cache.command()
@cache_option
@as_json
def ls(root: Path, in_json: bool) -> None:
    """List captures and scores, the most recently used first.

    An interrupted capture is listed as partial, with the number of windows that are done.
    """
    from pytest_kld.captures.cache import format_bytes
    from pytest_kld.captures.inventory import inventory
    from pytest_kld.report.terminal import aligned

    entries = inventory(root)
    if in_json:
        print_json([entry.to_json() for entry in entries])
        return
    if not entries:
        print_lines([f"{root} holds no captures and no scores."])
        return
    heading = ["Name", "Kind", "Model", "Dataset", "Windows", "Store", "Size", "Last used"]
    print_lines(aligned([heading, *map(_row, entries)], left=(0, 1, 2, 3, 5, 7)))
    print_lines([f"{len(entries)} entries, {format_bytes(sum(entry.bytes for entry in entries))} in {root}"])


def _row(entry: Entry) -> list[str]:
    from pytest_kld.captures.cache import format_bytes

    model = f"{entry.model} against {entry.reference}" if entry.reference else entry.model
    return [
        entry.name[:12] if entry.kind != "quarantine" else entry.name,
        "DAMAGED" if entry.damage else entry.kind,
        model or "-",
        entry.dataset or "-",
        f"{entry.windows:,}" if entry.windows else "-",
        entry.store or "-",
        format_bytes(entry.bytes),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
    ]


@cache.command()
@cache_option
@as_json
@click.argument("names", nargs=-1)
@click.pass_context
def verify(context: click.Context, root: Path, in_json: bool, names: tuple[str, ...]) -> None:
    """Read captures and scores completely and check them.

    NAMES are entries as `ls` shows them, or the beginnings of their names; without any, everything is checked. Checked
    are the digests of all files, that a head is the engine's, and that an entry is what its name says.

    Exit codes: 0 if all are intact, 1 if an entry is damaged. Nothing is changed: the next session that needs a
    damaged entry moves it to quarantine and makes it again.
    """
    found = [entry for entry in _chosen(root, names) if entry.kind in ("capture", "scores")]
    damaged = []
    results = []
    for entry in found:
        what = _damage(entry)
        damaged += [entry] if what else []
        results.append({"name": entry.name, "kind": entry.kind, "path": str(entry.path), "damage": what or None})
        if not in_json:
            print_lines([f"DAMAGED  {entry.kind} {entry.name}: {what}" if what else f"ok  {entry.kind} {entry.name}"])
    if in_json:
        print_json(results)
    else:
        print_lines([f"{len(found)} entries checked, {len(damaged)} damaged"])
    context.exit(Exit.NOT_IN_ORDER if damaged else Exit.IN_ORDER)


def _damage(entry: Entry) -> str:
    from pytest_kld.captures.inventory import key_of_scores, verify_capture
    from pytest_kld.errors import DamagedCaptureError, DamagedScoresError, KLDError
    from pytest_kld.figures.scores import Scores

    try:
        if entry.kind == "capture":
            verify_capture(entry.path)
        else:
            Scores.load(entry.path)
            if key_of_scores(entry.path)[:32] != entry.name:
                return f"the scores file {entry.path} contains other scores than its name says"
    except (DamagedCaptureError, DamagedScoresError) as damage:
        return damage.what
    except KLDError as error:
        return str(error)
    return ""


@cache.command()
@cache_option
@click.argument("names", nargs=-1)
@click.option("--to", "size", metavar="SIZE", help="Remove the least recently used entries until SIZE is left: 500GB.")
@click.option("--unused-for", "days", metavar="DAYS", type=click.FloatRange(min=0), help="Remove what was not used.")
@click.option("--partial", is_flag=True, help="Remove interrupted captures.")
@click.option("--quarantine", is_flag=True, help="Remove the damaged entries that were moved aside.")
@click.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing.")
def prune(
    root: Path,
    names: tuple[str, ...],
    size: str | None,
    days: float | None,
    partial: bool,
    quarantine: bool,
    dry_run: bool,
) -> None:
    """Remove entries: those that are NAMED, and those that the options choose.

    An entry that a session is making is not removed. `--to` spares entries that were used in the last 24 hours, as
    --kld-cache-size does; the other ways do not, so do not use them on entries that a session is reading.
    """
    from pytest_kld.captures.cache import Cache, format_bytes

    if not (names or size or days is not None or partial or quarantine):
        raise click.UsageError("say what to remove: NAMES, --to, --unused-for, --partial or --quarantine")
    entries = _chosen(root, ()) if root.is_dir() else []
    going = _chosen(root, names) if names else []
    going += [entry for entry in entries if days is not None and entry.used < time.time() - days * _DAY]
    going += [entry for entry in entries if partial and entry.kind == "partial"]
    going += [entry for entry in entries if quarantine and entry.kind == "quarantine"]
    going = list({entry.path: entry for entry in going}.values())
    if size is not None:
        going += _surplus([entry for entry in entries if entry not in going], _bytes(size))
    opened = Cache(root)
    removed = [entry for entry in going if dry_run or _remove(opened, entry)]
    print_lines([f"{'would remove' if dry_run else 'removed'} {entry.kind} {entry.name}" for entry in removed])
    print_lines([f"{len(removed)} entries, {format_bytes(sum(entry.bytes for entry in removed))}"])
    if kept := [entry.name for entry in going if entry not in removed]:
        raise Failed(f"a session is making these entries, so they were not removed: {', '.join(kept)}")


def _remove(opened: Cache, entry: Entry) -> bool:
    if entry.kind == "quarantine":
        opened.discard(entry.path)
        return True
    partial = entry.kind == "partial"
    return opened.remove(entry.path.with_suffix("") if partial else entry.path, partial_only=partial)


@cache.command()
@cache_option
@click.argument("archive", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("names", nargs=-1, required=True)
def export(root: Path, archive: Path, names: tuple[str, ...]) -> None:
    """Write the NAMED captures into one file, with the digests of everything in it.

    The same captures give the same bytes. Carry the file to another machine and import it there: the keys of captures
    do not depend on the machine, so a session there finds them.
    """
    from pytest_kld.captures.archive import export_captures
    from pytest_kld.captures.cache import format_bytes
    from pytest_kld.captures.capture import Capture

    chosen = _chosen(root, names)
    if others := [entry.name for entry in chosen if entry.kind != "capture"]:
        raise Failed(f"only complete captures can be exported, and this is none: {others[0]}")
    size = export_captures([Capture.open(entry.path) for entry in chosen], archive.resolve(), Stderr())
    print_lines([f"{len(chosen)} captures, {format_bytes(size)} in {archive}"])


@cache.command(name="import")
@cache_option
@click.argument("archive", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Check the file, and import nothing.")
@as_json
def import_(root: Path, archive: Path, check: bool, in_json: bool) -> None:
    """Add the captures of an exported FILE to the cache.

    The file is read as the work of a stranger: every byte is checked before the first one is unpacked. What the cache
    has already stays as it is.
    """
    from pytest_kld.captures.archive import check_archive, import_captures
    from pytest_kld.captures.cache import Cache

    if check:
        names = sorted({member.capture for member in check_archive(archive, Stderr())})
        done: list[dict[str, Any]] = [{"name": name} for name in names]
        lines = [f"intact  {name}" for name in names]
    else:
        imported = import_captures(archive, Cache(root), Stderr())
        done = [{"name": each.entry.name, "model": each.model, "was_there": each.was_there} for each in imported]
        lines = [
            f"{'was there' if each.was_there else 'imported'}  {each.entry.name}  {each.model}" for each in imported
        ]
    if in_json:
        print_json(done)
    else:
        print_lines(lines)


def _surplus(entries: Sequence[Entry], size: int) -> list[Entry]:
    """Return what has to go until the others fit: damaged entries first, then the least recently used."""
    total, going = sum(entry.bytes for entry in entries), []
    for entry in sorted(entries, key=lambda entry: (entry.kind != "quarantine", entry.used)):
        if total <= size:
            break
        if entry.kind == "quarantine" or entry.used < time.time() - _DAY:
            going.append(entry)
            total -= entry.bytes
    return going


def _bytes(text: str) -> int:
    from pytest_kld.settings.parsers import size

    try:
        return size(text, Path())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--to") from None


def _chosen(root: Path, names: Sequence[str]) -> list[Entry]:
    """Return the entries that are named, or all of them.

    Raises:
        Failed: there is no such entry, or a beginning fits several.

    """
    from pytest_kld.captures.inventory import inventory

    entries = inventory(root)
    chosen = []
    for name in names:
        fitting = [entry for entry in entries if entry.name.startswith(name)]
        whole = [entry for entry in fitting if entry.name == name] or fitting
        if len({entry.name for entry in whole}) != 1:
            many = f"{len(whole)} entries begin with {name!r}" if whole else f"there is no entry {name!r} in {root}"
            raise Failed(f"{many}; `pytest-kld cache ls` lists them")
        chosen += whole
    return chosen if names else entries
