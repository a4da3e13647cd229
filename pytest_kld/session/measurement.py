"""A session's measurement: obtains windows, captures and scores, from the cache where it has them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.cache import Cache, format_bytes
from pytest_kld.captures.capture import MANIFEST, SCHEMA, Capture
from pytest_kld.captures.recording import Recording, adopt_windows, require_fits
from pytest_kld.engines.sglang.engine import SGLangEngine
from pytest_kld.errors import CaptureError, ModelError, ServerError
from pytest_kld.figures.compare import compare, scores_key
from pytest_kld.figures.schedule import schedule
from pytest_kld.figures.scores import Scores
from pytest_kld.kernel.device import pick_device
from pytest_kld.session.selection import make_engine
from pytest_kld.subjects.model import ModelSpec, is_capture
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.tokens import Tokens
from pytest_kld.text.windows import Windows, chat_renderer, check_same_tokens, cut_windows, join_windows, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_kld.engines import Engine
    from pytest_kld.engines.sglang.pool import ServerHandle
    from pytest_kld.progress import Progress
    from pytest_kld.session.config import KLDConfig
    from pytest_kld.session.selection import EngineArguments, Role


class Measurement:
    """Turns the configuration into captures and scores, each made at most once."""

    def __init__(self, config: KLDConfig, progress: Progress) -> None:
        """Open the cache; nothing else happens yet.

        Raises:
            CacheError: the cache directory cannot be written.

        """
        self.config = config
        self.progress = progress
        self.cache = Cache(config.cache_dir)
        self.engine: Engine = make_engine(config, progress)
        self._origins: dict[Path, tuple[ModelSpec, Mapping[str, Any]]] = {}
        self._all_windows: Windows | None = None

    def close(self) -> None:
        """Shut down what runs, and keep the cache within its size.

        Raises:
            CacheError: an entry cannot be removed.

        """
        self.engine.close()
        if self.config.cache_size is None:
            return
        removed, left = self.cache.shrink(self.config.cache_size)
        if removed:
            self.progress.note(f"removed {removed} entries from the cache, which holds {format_bytes(left)} now")
        if left > self.config.cache_size:
            self.progress.note(
                f"the cache holds {format_bytes(left)}, more than --kld-cache-size: what is left is in use, "
                "or was within 24 hours"
            )

    @cached_property
    def tokenizer_model(self) -> ModelSpec:
        """The model whose tokenizer is used.

        Raises:
            ModelError: none is named, or it is not there.

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
        """What the tokenizer says about ids; None where a project's own windows do without one."""
        try:
            return Tokens.of(self.tokenizer)
        except ModelError:
            return None

    def windows(self) -> Windows:
        """Load each dataset and cut it, once every model that is named is known to be there."""
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

    def find(self, model: str) -> ModelSpec:
        """Return the model that a test names.

        Raises:
            ModelError: it is neither a directory nor a hub id.

        """
        try:
            return ModelSpec.parse(model, self.config.base)
        except ValueError as error:
            raise ModelError(str(error)) from None

    def serve(self, model: str, arguments: EngineArguments, role: Role, moe_backend: str | None) -> ServerHandle:
        """Return a server for a model: the one that runs, or a new one.

        Raises:
            ServerError: the engine has no servers, or it does not boot.

        """
        if not isinstance(self.engine, SGLangEngine):
            raise ServerError("kld_server needs SGLang: install it, or give --kld-engine=sglang")
        spec = self.find(model)
        given = arguments.of(role, spec, moe_backend)
        if "url" in given:
            raise ServerError(f"{spec.label} is served at {given['url']}; kld_server boots servers")
        return self.engine.servers.get(spec.pin(), given["args"], given["env"])

    def capture(self, model: ModelSpec, arguments: Mapping[str, Any], windows: Windows) -> Capture:
        """Return the reference's capture, from the cache or made now; with --kld-windows=auto of the first round."""
        return self._obtain(model, arguments, self._first_round(windows), None)

    def candidate_capture(
        self, model: ModelSpec, arguments: Mapping[str, Any], windows: Windows, reference: Capture
    ) -> Capture:
        """Return a candidate's capture, from the cache or made now; with --kld-windows=auto of the first round.

        Before the candidate's model is loaded, the reference's capture is verified: what was expensive should not
        turn out to be in vain.
        """
        return self._obtain(model, arguments, self._first_round(windows), reference)

    def extend(self, capture: Capture, windows: Windows, reference: Capture | None) -> Capture:
        """Return a capture of the same model that covers at least these windows.

        Args:
            capture: one of fewer windows that came from here, or one that covers them already.
            windows: what to cover.
            reference: the reference's capture, if it is a candidate's.

        Raises:
            CaptureError: a capture of fewer windows that is not from here.

        """
        if capture.windows >= windows.count:
            return capture
        if capture.path not in self._origins:
            raise CaptureError(
                f"the capture {capture.path} has {capture.windows} windows and {windows.count} are needed; give "
                "--kld-windows=auto:N with its number, or a model that can be run"
            )
        return self._obtain(*self._origins[capture.path], windows, reference)

    def scores(
        self,
        reference: Capture,
        candidate: Capture,
        windows: Windows,
        *,
        extended: bool = False,
        known: Scores | None = None,
    ) -> Scores:
        """Return the scores of a pair: those saved, without touching a capture's contents, or computed now.

        Saved scores without the extended columns give way to scores that have them, if these are needed. `known` are
        scores of the same pair's first windows.
        """
        config = self.config
        key = scores_key(reference, candidate, windows, config.head)
        path = self.cache.scores_entry(key)
        with self.cache.lock(path, lambda: self._say_waiting(f"scores of {candidate.name}")):
            if self._is_there(path):
                saved = Scores.load(path)
                if saved.extended or not extended:
                    # The token ids are the same, but their datasets may be called otherwise by now.
                    return replace(saved, about={**saved.about, "protocol": windows.protocol()})
            reference.verify()
            candidate.verify()
            self.engine.close()  # a comparison wants the memory that a server holds
            scores = compare(
                reference,
                candidate,
                windows,
                head=config.head,
                device=pick_device(config.device),
                progress=self.progress,
                extended=extended,
                known=known,
            )
            scores.save(path)
        return scores

    def _obtain(
        self, model: ModelSpec, arguments: Mapping[str, Any], windows: Windows, reference: Capture | None
    ) -> Capture:
        if model.path is not None and is_capture(model.path):
            return Capture.open(model.path, self._all_windows or windows)
        model = model.pin()
        if reference is not None:
            self._check_tokens(model, self._all_windows or windows)
        key = {
            "schema": SCHEMA,
            "model": model.identity(),
            "engine": self.engine.fingerprint(model, arguments),
            "token_ids_sha256": windows.digest,
            "store": self.config.store,
        }
        entry = self.cache.capture_entry(key)
        for more in self._rounds(above=windows.count):
            larger = self._entry_of(key, more)
            if self._is_there(larger / MANIFEST):
                entry, windows = larger, more
        with self.cache.lock(entry, lambda: self._say_waiting(f"capture of {model.label}")):
            if not self._is_there(entry / MANIFEST):
                if self.config.refresh or entry.exists():
                    self.cache.discard(entry)
                if reference is None:
                    self._check_candidates(self._all_windows or windows)
                else:
                    require_fits(self.engine.facts(model, arguments), windows, model.label)
                    reference.verify()
                for fewer in self._rounds(below=windows.count):
                    smaller = self._entry_of(key, fewer)
                    if self._is_there(smaller / MANIFEST):
                        adopt_windows(Capture.open(smaller, fewer), self.cache.partial(entry))
                recording = Recording(
                    engine=self.engine,
                    model=model,
                    arguments=arguments,
                    windows=windows,
                    store=self.config.store,
                    key=key,
                )
                recording.run(self.cache, entry, self.progress)
        self._origins[entry] = (model, arguments)
        return Capture.open(entry, windows)

    def _entry_of(self, key: dict[str, Any], windows: Windows) -> Path:
        """Return the entry of the same capture over other windows."""
        return self.cache.capture_entry({**key, "token_ids_sha256": windows.digest})

    def _first_round(self, windows: Windows) -> Windows:
        """Return what is captured at first, and remember what it may grow to."""
        if not self.config.adaptive:
            return windows
        self._all_windows = windows
        return windows.first(schedule(windows.count)[0].windows)

    def _rounds(self, *, above: int = 0, below: int | None = None) -> list[Windows]:
        """Return the windows of those rounds whose number lies between; none if this is no run in rounds."""
        if self._all_windows is None:
            return []
        counts = [look.windows for look in schedule(self._all_windows.count)]
        return [self._all_windows.first(n) for n in counts if above < n and (below is None or n < below)]

    def _check_candidates(self, windows: Windows) -> None:
        """Find what is wrong with a candidate before the reference is run, which may take hours."""
        for model in self.config.candidate:
            if not is_capture(model.path):
                self._check_candidate(model.pin(), {}, windows)

    def _check_candidate(self, model: ModelSpec, arguments: Mapping[str, Any], windows: Windows) -> None:
        require_fits(self.engine.facts(model, arguments), windows, model.label)
        self._check_tokens(model, windows)

    def _check_tokens(self, model: ModelSpec, windows: Windows) -> None:
        """Refuse a candidate to which the ids mean something else, unless a tokenizer was named for both sides."""
        if self.config.tokenizer is not None:
            return
        try:
            theirs = load_tokenizer(model, trust_remote_code=self.config.trust_remote_code)
        except ModelError:
            return  # a candidate without a tokenizer is run on the reference's ids, as every other is
        check_same_tokens(windows, self.tokenizer, theirs, model.label)

    def _is_there(self, made: Path) -> bool:
        """Tell whether an entry may be used; with --kld-refresh only what was made since the session began."""
        there = made.is_file() and not (self.config.refresh and made.stat().st_mtime < self.config.started)
        if there:
            self.cache.mark_used(made)
        return there

    def _say_waiting(self, what: str) -> None:
        self.progress.note(f"waiting for another process that makes the {what}")
