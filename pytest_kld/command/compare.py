"""`pytest-kld compare`: any two captures."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from pytest_kld.command.output import Failed, Stderr, directory
from pytest_kld.command.reports import deliver, judging_options, output_options, result_of

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.captures.capture import Capture
    from pytest_kld.command.reports import Judging, Outputs
    from pytest_kld.figures.scores import Scores
    from pytest_kld.kernel.head import HeadMode
    from pytest_kld.text.windows import Windows


@click.command(
    epilog="Exit codes: 0 if every figure is within its limit, 1 if not, 2 if the captures cannot be compared."
)
@click.argument("reference", type=directory)
@click.argument("candidate", type=directory)
@click.option("--scores", metavar="FILE", help="Save the figures of every position, for `pytest-kld report`.")
@click.option("--metrics", type=click.Choice(["core", "all"]), default="core", help="As --kld-metrics.")
@click.option("--head", type=click.Choice(["exact", "native"]), default="exact", help="As --kld-head.")
@click.option("--device", default="auto", metavar="DEVICE", help="As --kld-device: auto, cpu, cuda or cuda:N.")
@judging_options
@output_options
@click.pass_context
def compare(
    context: click.Context,
    reference: Path,
    candidate: Path,
    scores: str | None,
    metrics: str,
    head: HeadMode,
    device: str,
    judging: Judging,
    outputs: Outputs,
) -> None:
    """Compare two captures: KL(REFERENCE || CANDIDATE), and every other figure.

    Both are directories of captures: entries of a cache (`pytest-kld cache ls --json` has their paths), capture
    directories, or one of them in the original layout. Both are verified first. If one has more windows, the windows
    that both have are compared. If one was decoded, the positions that it has are compared.
    """
    from pathlib import Path as File

    from pytest_kld.gate.limits import needs_extended

    target = None
    if scores is not None:
        target = File(scores).resolve()
        if target.suffix != ".safetensors" or target.is_dir():
            raise click.BadParameter(f"expected a file whose name ends in .safetensors, got {scores!r}")
    extended = metrics == "all" or needs_extended(judging.limits)
    table = _compare(reference, candidate, head=head, device=device, extended=extended)
    if target is not None:
        table.save(target)
    result = result_of(table, f"{reference} {candidate}", judging)
    context.exit(deliver([result], None, outputs))


def _compare(reference: Path, candidate: Path, *, head: HeadMode, device: str, extended: bool) -> Scores:
    from pytest_kld.figures.compare import compare as compare_captures
    from pytest_kld.kernel.device import pick_device
    from pytest_kld.servers.leases import lease_device, lease_directory
    from pytest_kld.settings.parsers import device as parse_device

    try:
        chosen = pick_device(parse_device(device, reference))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    progress = Stderr()
    captures, windows = _opened(reference, candidate, progress)
    with lease_device(
        str(chosen), os.environ, lease_directory(), lambda: progress.note(f"waiting for {chosen}, which is in use")
    ):
        table = compare_captures(
            captures[0], captures[1], windows, head=head, device=chosen, progress=progress, extended=extended
        )
    for capture in captures:
        capture.require_unchanged()
    return table


def _opened(reference: Path, candidate: Path, progress: Stderr) -> tuple[list[Capture], Windows]:
    """Open and verify both captures, and return the windows that both have.

    Raises:
        Failed: neither has token ids.
        CaptureError: a capture is damaged.

    """
    from pytest_kld.captures.capture import Capture
    from pytest_kld.captures.covered import windows_of
    from pytest_kld.captures.manifest import MANIFEST

    def verified(capture: Capture) -> Capture:
        progress.note(f"verifying {capture.path}")
        capture.verify()
        return capture

    sides = (reference, candidate)
    described = {path: verified(Capture.open(path)) for path in sides if (path / MANIFEST).is_file()}
    if not described:
        raise Failed(
            f"neither {reference} nor {candidate} has a {MANIFEST}, so their token ids are unknown. If they are in the "
            "original layout, import one of them with `pytest-kld import-logprobs`."
        )
    covered = [windows_of(capture) for capture in described.values()]
    decoding = next((windows.decoding for windows in covered if windows.decoding), None)
    windows = replace(min(covered, key=lambda found: found.count), decoding=decoding)
    return [described.get(path) or verified(Capture.open(path, windows)) for path in sides], windows
