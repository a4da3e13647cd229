"""A session's measurement: obtains windows and captures, from the cache if it has them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.cache import Cache, format_bytes
from pytest_kld.captures.library import CaptureLibrary
from pytest_kld.captures.recording import require_fits
from pytest_kld.captures.sweep import sweep
from pytest_kld.engines.registry import SERVED
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.errors import CorpusError, KLDError, ModelError, ServerError
from pytest_kld.figures.schedule import rounds_of
from pytest_kld.measuring.scoring import Scoring
from pytest_kld.measuring.side_by_side import SideBySide, job_name
from pytest_kld.progress import Relay
from pytest_kld.settings.engines import make_engine
from pytest_kld.settings.subjects import candidates_of, on_path
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
    from collections.abc import Callable, Sequence

    from pytest_kld.captures.capture import Capture
    from pytest_kld.captures.library import Whereabouts
    from pytest_kld.captures.shared import SharedCache
    from pytest_kld.engines import Engine
    from pytest_kld.engines.served.pool import ServerHandle
    from pytest_kld.progress import Progress
    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.settings.subjects import Role
    from pytest_kld.subjects.subject import EnginePath, Subject


class Measurement:
    """Turns the configuration into captures, each made at most once; `scoring` turns pairs of them into scores."""

    def __init__(self, config: KLDConfig, progress: Progress, *, decodes: bool = False) -> None:
        """Open the cache and sweep it; nothing else happens yet.

        Args:
            config: the settings.
            progress: receives notes.
            decodes: whether any test with these settings decodes.

        Raises:
            CacheError: the cache directory cannot be written.

        """
        self.config = config
        self.progress = progress = Relay(progress)
        self.ahead: SideBySide | None = None
        self.cache = Cache(config.cache_dir, config.started if config.refresh else None)
        self.digests = FileDigests(
            kind=config.hash, memo=config.cache_dir / MEMO, fresh=config.refresh, note=progress.note
        )
        sweep(config.cache_dir, config.capture_dir or config.cache_dir / "spool")
        self.library = CaptureLibrary(
            cache=self.cache,
            engine=self.engine,
            make_room=self._close_engines,
            identify=self.identify,
            store=config.store,
            progress=progress,
            strict=config.strict_cache,
            shared=_shared_cache(config, progress),
        )
        self.scoring = Scoring(config=config, library=self.library, make_room=self._close_engines, progress=progress)
        self._decodes = decodes
        self._engines: dict[str, Engine] = {}
        self._unfit: dict[str, KLDError] = {}
        self._beside: list[Subject] = []

    def engine(self, name: str) -> Engine:
        """Return an engine by its name, made on first use."""
        if name not in self._engines:
            self._engines[name] = make_engine(name, self.config, self.progress, decodes=self._decodes)
        return self._engines[name]

    @property
    def engines(self) -> list[Engine]:
        """The engines that were made so far."""
        return list(self._engines.values())

    def identify(self, model: ModelSpec) -> dict[str, Any]:
        """Return what determines a pinned model's bits. See `ModelSpec.identity`."""
        return model.identity(self.digests, trust_remote_code=self.config.trust_remote_code)

    def close(self) -> None:
        """Shut down the engines, and keep the cache within its size.

        Raises:
            CacheError: an entry cannot be removed.

        """
        if self.ahead is not None:
            self.ahead.stop()
        self.progress.flush()
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
                    taken_from=config.windows_from,
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
            choices = " or ".join(f"--kld-engine={name}" for name in SERVED)
            raise ServerError(f"kld_server needs an engine with servers: install one, or give {choices}")
        if "url" in subject.arguments:
            raise ServerError(
                f"{subject.name} is served at {subject.arguments['url']}, but kld_server boots its own servers"
            )
        self._close_engines(subject.engine)
        return engine.servers.get(subject.pin().spec, subject.arguments["args"], subject.environment)

    def on_path(self, windows: Windows, path: EnginePath) -> Windows:
        """Return windows as they are run on a path through the engine.

        Raises:
            CorpusError: a prompt leaves no continuation.

        """
        if path == "prefill":
            return windows.prefilled()
        return windows.decoded(self.config.prompt_size, self.config.concurrency)

    def reference_on(self, path: EnginePath, reference: Capture, windows: Windows) -> Capture:
        """Return the reference's capture on a path: this one, or another of the same Subject."""
        subject = self.library.subject_of(reference)
        if subject is None or subject.path == path:
            return reference
        return self.capture(replace(subject, path=path), windows)

    def capture(self, subject: Subject, windows: Windows, also: Sequence[EnginePath] = ()) -> Capture:
        """Return the reference's capture, from the cache or made now; with --kld-windows=auto, the first round's.

        Args:
            subject: the reference.
            windows: the windows, on whichever path.
            also: other paths on which it will be needed; see `capture_beside`.

        Raises:
            CorpusError: a project's own windows are not spread over the text although that is requested.

        """
        if self.config.windows_from == "spread" != windows.taken_from:
            raise CorpusError(
                "--kld-windows-from=spread has no effect here: the project's own fixture `kld_windows` gives windows "
                "that are not spread over the text. Leave the option out, or remove the fixture."
            )
        windows = self.on_path(windows, subject.path)
        self._wait(subject, is_reference=True)
        rounds = self._rounds(windows)
        captured = self.library.obtain(
            subject, rounds[0], rounds=rounds, before=lambda: self._check_candidates(windows)
        )
        if self.ahead is None:  # else all paths were captured ahead
            self.capture_beside(subject, windows, also, self._check_candidates)
        return captured

    def candidate_capture(
        self, subject: Subject, windows: Windows, reference: Capture, also: Sequence[EnginePath] = ()
    ) -> Capture:
        """Return a candidate's capture, from the cache or made now; with --kld-windows=auto, the first round's.

        The reference's capture is verified before the candidate's model is loaded, so that no expensive run is wasted.

        Args:
            subject: the candidate.
            windows: the windows, on whichever path.
            reference: what it is compared with.
            also: other paths on which it will be needed; see `capture_beside`.

        """
        windows = self.on_path(windows, subject.path)
        if not is_capture(subject.spec.path):
            self._check_tokens(subject.pin(), windows)
        self._wait(subject, is_reference=False)

        def check() -> None:
            self._require_fits(subject.pin(), windows)
            self.library.verify(self.library.current(reference))

        rounds = self._rounds(windows)
        captured = self.library.mending(lambda: self.library.obtain(subject, rounds[0], rounds=rounds, before=check))
        compared = self.library.subject_of(reference)
        if self.ahead is None and compared is not None:
            known = [path for path in also if self.whereabouts(on_path(compared, path), windows) != "nowhere"]
            self.capture_beside(subject, windows, known)
        return captured

    def capture_again(
        self,
        subject: Subject,
        windows: Windows,
        rounds: Sequence[Windows],
        also: Sequence[EnginePath] = (),
        *,
        role: Role,
    ) -> Capture:
        """Return a capture of a Subject's second run, from the cache or made now by a server or a load of its own.

        Args:
            subject: what was captured in the first run.
            windows: what the capture must cover, on the Subject's path.
            rounds: the windows of every round, the last of which are all.
            also: other paths on which it will be needed; see `capture_beside`.
            role: what the Subject is in this session.

        """
        again = replace(subject, run=2)
        self._wait(again, is_reference=role == "reference")
        captured = self.library.mending(lambda: self.library.obtain(again, windows, rounds=rounds))
        if self.ahead is None:
            self.capture_beside(again, rounds[-1], also)
        return captured

    def capture_beside(
        self,
        subject: Subject,
        windows: Windows,
        paths: Sequence[EnginePath],
        check: Callable[[Windows], None] = lambda _: None,
    ) -> None:
        """Capture a Subject on further paths while its server is up, so that one boot serves them all.

        What prevents that is left to the test that needs the capture: it tries again, and reports it. So each is tried
        only once here.

        Args:
            subject: what was captured just now.
            windows: the windows, on whichever path.
            paths: the further paths.
            check: called with the windows on a path before they are run; raises if the run would be useless.

        """
        if is_capture(subject.spec.path) or "url" in subject.arguments:
            return
        if not isinstance(self.engine(subject.engine), ServedEngine):  # it keeps no model loaded
            return
        for other in (on_path(subject, path) for path in paths):
            if other in self._beside:
                continue
            self._beside.append(other)
            with suppress(KLDError):
                rounds = self._rounds(self.on_path(windows, other.path))
                self.library.obtain(other, rounds[0], rounds=rounds, before=partial(check, rounds[-1]))

    def whereabouts(self, subject: Subject, windows: Windows) -> Whereabouts:
        """Tell where the capture of a pinned Subject is; with --kld-windows=auto, that of the first round."""
        return self.library.whereabouts(subject, self._rounds(self.on_path(windows, subject.path))[0])

    def _wait(self, subject: Subject, *, is_reference: bool) -> None:
        """Wait for a capture that is made ahead of its test, if this is one."""
        if self.ahead is not None:
            self.ahead.wait(job_name(subject, is_reference=is_reference), self.progress.flush)

    def find_unfit(
        self, subjects: Sequence[Subject], windows: Windows, complete: Callable[[Subject], Subject]
    ) -> list[Subject]:
        """Look for problems with a suite's candidates before anything runs; `require_fit` reports them one by one.

        Args:
            subjects: the candidates.
            windows: the windows that they will run over.
            complete: returns a candidate as it will be run, or raises.

        Returns:
            The candidates without problems, as they will be run.

        Raises:
            KLDError: none of the candidates can be run.

        """
        fit = []
        for subject in subjects:
            if is_capture(subject.spec.path):
                fit.append(subject)
                continue
            try:
                completed = complete(subject)
                pinned = completed.pin()
                self._require_fits(pinned, windows)
                self._check_tokens(pinned, windows)
                if "url" not in subject.arguments:
                    self.engine(subject.engine).fingerprint(pinned)  # finds an engine that is not installed
                fit.append(completed)
            except KLDError as error:
                self._unfit[subject.id] = error
        if subjects and len(self._unfit) == len(subjects):
            raise next(iter(self._unfit.values()))
        return fit

    def require_fit(self, subject: Subject) -> None:
        """Raise the problem that `find_unfit` found with a candidate, if any."""
        if (problem := self._unfit.get(subject.id)) is not None:
            raise problem

    def extend(self, capture: Capture, windows: Windows, rounds: Sequence[Windows]) -> Capture:
        """Return a capture of the same Subject that covers at least these windows. See `CaptureLibrary.extend`."""
        return self.library.extend(capture, windows, rounds=rounds, before=lambda: self._check_candidates(rounds[-1]))

    def _rounds(self, windows: Windows) -> list[Windows]:
        """Return the windows that are captured first, then those of each further round."""
        return rounds_of(windows, adaptive=self.config.adaptive)

    def _check_candidates(self, windows: Windows) -> None:
        """Find problems with a candidate before the reference runs on these windows, which may take hours."""
        path: EnginePath = "prefill" if windows.decoding is None else "decode"
        for subject in candidates_of(self.config):
            if not is_capture(subject.spec.path):
                pinned = on_path(subject, path).pin()
                self._require_fits(pinned, windows)
                self.identify(pinned.spec)
                self._check_tokens(pinned, windows)

    def _require_fits(self, subject: Subject, windows: Windows) -> None:
        facts = self.engine(subject.engine).facts(subject)
        require_fits(facts, windows, subject.label)
        if "min_experts_seen" in self.config.bounds and facts.experts is None:
            raise ModelError(f"--kld-min-experts-seen: {subject.label} is dense: it has no experts to meet")

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

    def _close_engines(self, but: str | None = None) -> None:
        """Shut the engines down, except one: a comparison, or another engine, needs the memory of their servers."""
        for name, engine in self._engines.items():
            if name != but:
                engine.close()


def _shared_cache(config: KLDConfig, progress: Progress) -> SharedCache | None:
    if config.cache_url is None:
        return None
    from pytest_kld.captures.remote import Remote
    from pytest_kld.captures.shared import SharedCache

    return SharedCache(
        remote=Remote(config.cache_url),
        push=config.cache_push,
        read=not config.refresh,
        strict=config.strict_cache,
        progress=progress,
    )
