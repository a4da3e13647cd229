"""A session's measurement: obtains windows, captures and scores, from the cache if it has them."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.cache import Cache, format_bytes
from pytest_kld.captures.library import CaptureLibrary, say_set_aside
from pytest_kld.captures.recording import require_fits
from pytest_kld.captures.sweep import sweep
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.errors import DamagedScoresError, ModelError, ServerError
from pytest_kld.figures.compare import compare, scores_key
from pytest_kld.figures.schedule import rounds_of
from pytest_kld.figures.scores import Scores
from pytest_kld.kernel.device import pick_device
from pytest_kld.servers.leases import lease_device, lease_directory
from pytest_kld.session.engines import make_engine
from pytest_kld.session.subjects import candidates_of
from pytest_kld.subjects.digests import MEMO, FileDigests
from pytest_kld.subjects.model import ModelSpec, is_capture
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.tokens import Tokens
from pytest_kld.text.windows import (
    Windows,
    chat_renderer,
    check_same_tokens,
    cut_windows,
    join_windows,
    load_tokenizer,
    load_tokenizer_if_any,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from pytest_kld.captures.capture import Capture
    from pytest_kld.engines import Engine
    from pytest_kld.engines.served.pool import ServerHandle
    from pytest_kld.progress import Progress
    from pytest_kld.session.config import KLDConfig
    from pytest_kld.subjects.subject import Subject


class Measurement:
    """Turns the configuration into captures and scores, each made at most once."""

    def __init__(self, config: KLDConfig, progress: Progress) -> None:
        """Open the cache and sweep it; nothing else happens yet.

        Raises:
            CacheError: the cache directory cannot be written.

        """
        self.config = config
        self.progress = progress
        self.cache = Cache(config.cache_dir, config.started if config.refresh else None)
        self.digests = FileDigests(
            kind=config.hash, memo=config.cache_dir / MEMO, fresh=config.refresh, note=progress.note
        )
        sweep(config.cache_dir, config.capture_dir or config.cache_dir / "spool")
        self.library = CaptureLibrary(
            cache=self.cache,
            engine=self.engine,
            identify=self.identify,
            store=config.store,
            progress=progress,
            strict=config.strict_cache,
        )
        self._engines: dict[str, Engine] = {}

    def engine(self, name: str) -> Engine:
        """Return an engine by its name, made on first use."""
        if name not in self._engines:
            self._engines[name] = make_engine(name, self.config, self.progress)
        return self._engines[name]

    def identify(self, model: ModelSpec) -> dict[str, Any]:
        """Return what determines a pinned model's bits. See `ModelSpec.identity`."""
        return model.identity(self.digests, trust_remote_code=self.config.trust_remote_code)

    def close(self) -> None:
        """Shut down the engines, and keep the cache within its size.

        Raises:
            CacheError: an entry cannot be removed.

        """
        self._close_engines()
        if self.config.cache_size is None:
            return
        removed, left = self.cache.shrink(self.config.cache_size)
        if removed:
            self.progress.note(f"removed {removed} entries from the cache, which holds {format_bytes(left)} now")
        if left > self.config.cache_size:
            self.progress.note(
                f"the cache holds {format_bytes(left)}, more than --kld-cache-size: its remaining entries are in use, "
                "or were used in the last 24 hours"
            )

    @cached_property
    def tokenizer_model(self) -> ModelSpec:
        """The model whose tokenizer is used.

        Raises:
            ModelError: no model is named, or the named one does not exist.

        """
        model = self.config.tokenizer or self.config.ref
        if model is None:
            raise ModelError("there is no tokenizer: give --kld-ref or --kld-tokenizer")
        if is_capture(model.path):
            raise ModelError(
                f"{model.path} is a capture and has no tokenizer: name the model that it was made from with "
                "--kld-tokenizer"
            )
        return model.pin()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that cuts the text."""
        return load_tokenizer(self.tokenizer_model, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def tokens(self) -> Tokens | None:
        """What the tokenizer tells about token ids; None if a project's own windows need no tokenizer."""
        try:
            return Tokens.of(self.tokenizer)
        except ModelError:
            return None

    def windows(self) -> Windows:
        """Check that every named model exists, then load each dataset and cut it into windows."""
        config = self.config
        for model in (config.ref, *config.candidate):
            if model is not None and not is_capture(model.path):
                model.pin()
        tokenizer = self.tokenizer
        label = self.tokenizer_model.label
        render = chat_renderer(tokenizer, label)
        return join_windows(
            [
                cut_windows(
                    load_corpus(dataset, config.base, render),
                    tokenizer,
                    count=config.windows,
                    size=config.window_size,
                    stride=config.stride,
                    label=label,
                )
                for dataset in config.dataset
            ]
        )

    def serve(self, subject: Subject) -> ServerHandle:
        """Return a server for a Subject: the one that is running, or a new one.

        Raises:
            ServerError: the engine has no servers, or the server does not boot.

        """
        engine = self.engine(subject.engine)
        if not isinstance(engine, ServedEngine):
            raise ServerError("kld_server needs SGLang: install it, or give --kld-engine=sglang")
        if "url" in subject.arguments:
            raise ServerError(
                f"{subject.name} is served at {subject.arguments['url']}, but kld_server boots its own servers"
            )
        return engine.servers.get(subject.pin().spec, subject.arguments["args"], subject.environment)

    def capture(self, subject: Subject, windows: Windows) -> Capture:
        """Return the reference's capture, from the cache or made now; with --kld-windows=auto, the first round's."""
        return self.library.obtain(
            subject, self._first(windows), rounds=self._rounds(windows), before=lambda: self._check_candidates(windows)
        )

    def candidate_capture(self, subject: Subject, windows: Windows, reference: Capture) -> Capture:
        """Return a candidate's capture, from the cache or made now; with --kld-windows=auto, the first round's.

        The reference's capture is verified before the candidate's model is loaded, so that no expensive run is wasted.
        """
        if not is_capture(subject.spec.path):
            self._check_tokens(subject.pin(), windows)

        def check() -> None:
            self._require_fits(subject.pin(), windows)
            self.library.verify(self.library.current(reference))

        return self.library.mending(
            lambda: self.library.obtain(subject, self._first(windows), rounds=self._rounds(windows), before=check)
        )

    def extend(self, capture: Capture, windows: Windows, rounds: Sequence[Windows]) -> Capture:
        """Return a capture of the same Subject that covers at least these windows. See `CaptureLibrary.extend`."""
        return self.library.extend(capture, windows, rounds=rounds, before=lambda: self._check_candidates(rounds[-1]))

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
            lambda: self._scores(
                self.library.current(reference),
                self.library.current(candidate),
                windows,
                extended=extended,
                known=known,
            )
        )

    def _scores(
        self, reference: Capture, candidate: Capture, windows: Windows, *, extended: bool, known: Scores | None
    ) -> Scores:
        config = self.config
        key = scores_key(reference, candidate, windows, config.head)
        path = self.cache.scores_entry(key)
        with self.cache.lock(path, lambda: self._say_waiting(f"scores of {candidate.name}")):
            saved = self._saved_scores(path, key)
            if saved is not None and (saved.extended or not extended):
                # The token ids are the same, but their datasets may have other names by now.
                return replace(saved, about={**saved.about, "protocol": windows.protocol()})
            for capture in (reference, candidate):
                self.library.verify(capture)
            self._close_engines()  # a comparison needs the memory that a server holds
            device = pick_device(config.device)
            with lease_device(str(device), os.environ, lease_directory(), lambda: self._say_leased(device)):
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
        return scores

    def _saved_scores(self, path: Path, key: dict[str, Any]) -> Scores | None:
        """Return the scores in the cache; None if they are missing, or if they were damaged and are now set aside."""
        if not self.cache.holds(path) and (self.cache.refreshed_since is not None or not path.exists()):
            return None
        try:
            return Scores.load(path, key)
        except DamagedScoresError as damage:
            if self.config.strict_cache:
                raise
            say_set_aside(path, self.cache.quarantine.take(path), damage.what, self.progress)
            return None

    def _first(self, windows: Windows) -> Windows:
        """Return the windows that are captured first."""
        return self._rounds(windows)[0]

    def _rounds(self, windows: Windows) -> list[Windows]:
        return rounds_of(windows) if self.config.adaptive else [windows]

    def _check_candidates(self, windows: Windows) -> None:
        """Find problems with a candidate before the reference runs, which may take hours."""
        for subject in candidates_of(self.config):
            if not is_capture(subject.spec.path):
                pinned = subject.pin()
                self._require_fits(pinned, windows)
                self.identify(pinned.spec)
                self._check_tokens(pinned, windows)

    def _require_fits(self, subject: Subject, windows: Windows) -> None:
        require_fits(self.engine(subject.engine).facts(subject), windows, subject.label)

    def _check_tokens(self, subject: Subject, windows: Windows) -> None:
        """Reject a candidate that gives the ids another meaning, unless a tokenizer was named for both sides."""
        if self.config.tokenizer is not None:
            return
        theirs = load_tokenizer_if_any(subject.spec, trust_remote_code=self.config.trust_remote_code)
        if theirs is None:  # it runs on the reference's ids, like every candidate
            self.progress.note(
                f"{subject.name} has no tokenizer, so it is unknown whether its token ids mean the same as those of "
                f"{windows.tokenizer}"
            )
            return
        check_same_tokens(windows, self.tokenizer, theirs, subject.name)

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _say_leased(self, device: torch.device) -> None:
        self.progress.note(f"waiting for {device}, which another session is using")

    def _say_waiting(self, what: str) -> None:
        self.progress.note(f"waiting for another process, which is making the {what}")
