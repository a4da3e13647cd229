"""A session's scores: those of a pair of captures, from the cache if it has them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.library import say_set_aside
from pytest_kld.errors import DamagedScoresError, ModelError
from pytest_kld.figures.compare import compare, describe_capture, scores_key
from pytest_kld.figures.schedule import rounds_of
from pytest_kld.figures.scores import Scores
from pytest_kld.kernel.device import pick_device
from pytest_kld.servers.leases import lease_device, lease_directory
from pytest_kld.servers.quiet import at_work
from pytest_kld.settings.subjects import on_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from pytest_kld.captures.capture import Capture
    from pytest_kld.captures.library import CaptureLibrary
    from pytest_kld.progress import Progress
    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.text.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Turns pairs of captures into scores, each made at most once.

    Attributes:
        config: the settings.
        library: where the captures are from; its cache keeps the scores.
        make_room: called before a comparison, which needs the memory that servers hold.
        progress: receives messages about what is compared, awaited and replaced.

    """

    config: KLDConfig
    library: CaptureLibrary
    make_room: Callable[[], None]
    progress: Progress

    def scores(
        self,
        reference: Capture,
        candidate: Capture,
        windows: Windows,
        *,
        extended: bool = False,
        known: Scores | None = None,
    ) -> Scores:
        """Return the scores of a pair: saved ones, without reading a capture's contents, or those computed now.

        Saved scores that lack the extended columns are replaced if those columns are needed. `known` are scores of the
        same pair's first windows. Damaged captures and damaged scores in the cache are recreated.

        Raises:
            DamagedCaptureError: a capture that was named by its path is damaged.

        """
        return self.library.mending(
            lambda: self.compute(
                self.library.current(reference),
                self.library.current(candidate),
                windows,
                extended=extended,
                known=known,
            )
        )

    def compute(
        self, reference: Capture, candidate: Capture, windows: Windows, *, extended: bool, known: Scores | None
    ) -> Scores:
        """Return the scores of a pair from the cache, or compute and save them. Replaces nothing that is damaged."""
        config, cache = self.config, self.library.cache
        key = scores_key(reference, candidate, windows, config.head)
        path = cache.scores_entry(key)
        with cache.lock(path, lambda: self._say_waiting(f"scores of {candidate.name}")):
            saved = self._saved(path, key)
            if saved is not None and (saved.extended or not extended):
                # The contents are the same, but datasets may have other names by now, and captures say more.
                sides = {"reference": describe_capture(reference), "candidate": describe_capture(candidate)}
                return replace(
                    saved, about={**saved.about, **sides, "protocol": windows.protocol(), "scores": path.stem}
                )
            for capture in (reference, candidate):
                self.library.verify(capture)
            self.make_room()
            device = pick_device(config.device)
            with (
                lease_device(str(device), os.environ, lease_directory(), lambda: self._say_leased(device)),
                at_work(lease_directory()),
            ):
                scores = compare(
                    reference,
                    candidate,
                    windows,
                    head=config.head,
                    device=device,
                    progress=self.progress,
                    extended=extended,
                    known=known,
                )
            for capture in (reference, candidate):
                capture.require_unchanged()
            scores.save(path, key)
        return replace(scores, about={**scores.about, "scores": path.stem})

    def with_gaps(self, scores: Scores, reference: Capture, candidate: Capture, windows: Windows) -> Scores:
        """Add to scores of decoding how far each side departs from its own prefill; see `Scores.with_gaps`.

        Args:
            scores: of the pair.
            reference: the reference's capture, decoded.
            candidate: the candidate's.
            windows: those of the scores, decoded.

        Raises:
            ModelError: a side is a capture, whose prefill cannot be made.

        """
        rounds = [one.prefilled() for one in rounds_of(windows, adaptive=self.config.adaptive)]
        gaps = []
        for decoded in (candidate, reference):
            subject = self.library.subject_of(decoded)
            if subject is None:
                raise ModelError(
                    f"{decoded.path} was named as a capture, so its model cannot be run on the other path: name the "
                    "model for --kld-path=both, or give one path"
                )
            prefilled = self.library.obtain(on_path(subject, "prefill"), windows.prefilled(), rounds=rounds)
            gaps.append(self.scores(prefilled, decoded, windows))
        return scores.with_gaps(*gaps)

    def _saved(self, path: Path, key: dict[str, Any]) -> Scores | None:
        """Return the scores in the cache; None if they are missing, or if they were damaged and are now set aside."""
        cache = self.library.cache
        if not cache.holds(path) and (cache.refreshed_since is not None or not path.exists()):
            return None
        try:
            return Scores.load(path, key)
        except DamagedScoresError as damage:
            if self.config.strict_cache:
                raise
            say_set_aside(path, cache.quarantine.take(path), damage.what, self.progress)
            return None

    def _say_leased(self, device: torch.device) -> None:
        self.progress.note(f"waiting for {device}, which another session is using")

    def _say_waiting(self, what: str) -> None:
        self.progress.note(f"waiting for another process, which is making the {what}")
