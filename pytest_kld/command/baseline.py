"""`pytest-kld baseline`: earlier results that later ones are held against."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_kld.command.output import Exit, Failed, as_json, directory, existing, print_json, print_lines

if TYPE_CHECKING:
    from pytest_kld.gate.baseline import Baseline
    from pytest_kld.gate.result import GateResult

target = click.argument("target", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
held = click.argument("held", metavar="DIR", type=directory)


@click.group()
def baseline() -> None:
    """Make results the baselines that later ones are held against, and look at them.

    A baseline is a small JSON file per candidate, to be kept in git. `pytest --kld-baseline=DIR
    --kld-max-regression=mean:5%` holds a session's results against them.
    """


@baseline.command(
    epilog="Exit codes: 0 if every chosen result was promoted, 2 if not, in which case nothing was changed."
)
@click.argument("report", metavar="JSON", type=existing)
@target
@click.option("--only", metavar="NAME", multiple=True, help="Promote only this candidate. Repeatable.")
@click.option("--failed", is_flag=True, help="Promote results too that failed a limit or regressed.")
def promote(report: Path, target: Path, only: tuple[str, ...], failed: bool) -> None:
    """Make the results of a JSON report the baselines in DIR.

    Results that were not measured cannot be promoted, and those that failed only with --failed. Existing baselines of
    the same candidates are replaced.
    """
    from pytest_kld.gate.baseline import Baseline, baseline_file
    from pytest_kld.report.json_file import read_json_report

    read = read_json_report(report)
    chosen = _chosen(read.results, only)
    if bad := [result for result in chosen.values() if result.outcome != "passed" and not failed]:
        names = ", ".join(f"{result.candidate.label} ({result.outcome})" for result in bad)
        raise Failed(f"these results did not pass: {names}. Name the others with --only, or give --failed.")
    made = {label: Baseline.of(result, read.created) for label, result in chosen.items()}
    target.mkdir(parents=True, exist_ok=True)
    for label, new in made.items():
        file = baseline_file(target, label)
        word = "replaced" if file.exists() else "made"
        new.save(file)
        print_lines([f"{word} {file}: {label}, mean {new.figures['mean']:.6f} nats"])


def _chosen(results: tuple[GateResult, ...], only: tuple[str, ...]) -> dict[str, GateResult]:
    """Return one result for each candidate.

    Raises:
        Failed: there is no result, a name is unknown, or tests of one candidate measured it differently.

    """
    found: dict[str, GateResult] = {}
    for result in results:
        label = result.candidate.label
        if only and label not in only:
            continue
        other = found.setdefault(label, result)
        if (other.figures, other.about) != (result.figures, result.about):
            raise Failed(f"{other.nodeid} and {result.nodeid} measured {label} differently, so neither can be promoted")
        if result.outcome != "passed":
            found[label] = result
    if missing := [name for name in only if name not in found]:
        known = ", ".join(dict.fromkeys(result.candidate.label for result in results))
        raise Failed(f"the report has no result of {missing[0]}; it has {known or 'none at all'}")
    if not found:
        raise Failed("the report has no results")
    return found


def _baselines(path: Path) -> list[tuple[Path, Baseline]]:
    from pytest_kld.gate.baseline import Baseline

    return [(file, Baseline.load(file)) for file in sorted(path.glob("*.json"))]


@baseline.command(name="list")
@held
@as_json
def list_(held: Path, in_json: bool) -> None:
    """List the baselines in DIR."""
    from pytest_kld.report.terminal import aligned

    found = _baselines(held)
    if in_json:
        print_json([{"file": str(file), **_described(one)} for file, one in found])
        return
    if not found:
        print_lines([f"{held} holds no baselines."])
        return
    rows = [
        [
            one.subject,
            one.reference,
            f"{one.figures['mean']:.6f}",
            f"{one.figures['p99']:.6f}",
            str(one.made_from["candidate"].get("model")),
            str(one.made_from.get("created")),
        ]
        for _, one in found
    ]
    heading = ["Candidate", "Reference", "Mean KLD", "P99 KLD", "Made from", "Reported"]
    print_lines(aligned([heading, *rows], left=(0, 1, 4, 5)))


def _described(one: Baseline) -> dict[str, Any]:
    from dataclasses import asdict

    from pytest_kld.gate.baseline import in_json

    return {**asdict(one), "figures": in_json(one.figures)}


@baseline.command()
@held
@click.argument("name")
def show(held: Path, name: str) -> None:
    """Print the baseline of the candidate NAME, as JSON."""
    from pytest_kld.gate.baseline import baseline_file, find_baseline

    found = find_baseline(held, name)
    if found is None:
        known = ", ".join(one.subject for _, one in _baselines(held)) or "none"
        raise Failed(f"there is no baseline of {name} in {held}; there is {known}")
    print_json({"file": str(baseline_file(held, name)), **_described(found)})


@baseline.command(
    epilog="Exit codes: 0 if no figure fell behind by more than allowed, 1 if one did or a candidate has no baseline, "
    "2 if a result cannot be held against its baseline."
)
@click.argument("report", metavar="JSON", type=existing)
@held
@click.option("--max-regression", "allowed", metavar="FIGURE:AMOUNT", multiple=True, help="As --kld-max-regression.")
@as_json
@click.pass_context
def diff(context: click.Context, report: Path, held: Path, allowed: tuple[str, ...], in_json: bool) -> None:
    """Show how the results of a JSON report differ from the baselines in DIR, by their figures."""
    from pytest_kld.errors import BaselineError
    from pytest_kld.gate.baseline import find_baseline
    from pytest_kld.gate.regression import Allowance, changes
    from pytest_kld.report.json_file import read_json_report

    try:
        allowances = tuple(map(Allowance.parse, allowed))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-regression") from None
    rows: list[dict[str, Any]] = []
    good = True
    for label, result in _chosen(read_json_report(report).results, ()).items():
        before = find_baseline(held, label)
        if before is None or result.figures is None or result.about is None:
            good = False
            rows.append({"candidate": label, "problem": "no baseline" if before is None else "not measured"})
            continue
        if differing := before.what_differs(result.about):
            raise BaselineError(f"{label} cannot be held against its baseline: {'; '.join(differing)}")
        try:
            found = changes(before.figures, result.figures, allowances)
        except ValueError as error:
            raise BaselineError(str(error)) from None
        good = good and all(change.state == "pass" for change in found)
        rows.append({"candidate": label, "changes": found, "notes": before.notes(result.about)})
    if in_json:
        print_json([{**row, "changes": [change.to_json() for change in row.get("changes", ())]} for row in rows])
    else:
        for row in rows:
            print_lines([f"{row['candidate']}: {row['problem']}" if "problem" in row else f"{row['candidate']}:"])
            print_lines([f"  {change}" for change in row.get("changes", ())])
            print_lines([f"  note: {note}" for note in row.get("notes", ())])
    context.exit(Exit.IN_ORDER if good else Exit.NOT_IN_ORDER)
