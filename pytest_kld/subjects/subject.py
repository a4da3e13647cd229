"""The Subject: what is run and captured. Cache keys are made from it, and each row of a report shows one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pytest_kld.plain import secret_digest
from pytest_kld.subjects.model import ModelSpec

EnginePath = Literal["prefill", "decode"]
"""The path through an engine that is measured: all tokens at once, or one token a step after a prompt."""
MOE_BACKEND = "moe backend"
"""The axis that `--kld-moe-backend` and the fixture `kld_moe_backend` set."""
PREFILL_CHUNK = "prefill chunk"
"""The axis of a suite for the tokens that are prefilled at a time: later chunks read the KV cache."""
ENGINE = "engine"
"""The axis that `--kld-candidate-engine` sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model, as one engine runs it. The reference is a Subject, and so is each candidate.

    Attributes:
        name: its name in reports, without its axes; usually the model as the user named it.
        model: the model; None if a fixture of the user's project makes the capture.
        engine: `sglang`, `vllm`, `transformers`, …; empty if `model` is a capture or None.
        arguments: the engine's own arguments: keyword arguments of `from_pretrained` (`transformers`), or the flags
            `args` of a server or the `url` of a running one (served engines).
        environment: environment variables of its server, in addition to the inherited ones.
        path: the path through the engine.
        axes: the values that distinguish Subjects of one model, by name, in order: `{"moe backend": "triton"}`.
        run: 1, or 2 for a Subject that is run once more, by a server or a load of its own; see `gate.floor`.
        limits: its own bounds, by limit; they override the command line and the ini file.
        speed: what holds for its speed alone: further flags of the server that is put under load (`args`), and bounds
            as the options take them (`min_output_tps`, …); they override the command line and the ini file.
        tags: words by which it can be selected.

    """

    name: str
    model: ModelSpec | None = None
    engine: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    path: EnginePath = "prefill"
    axes: Mapping[str, str] = field(default_factory=dict)
    run: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)
    speed: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Return the name with the values of the axes, and the path unless it is prefill, for reports and messages."""
        return self.variant if self.path == "prefill" else f"{self.variant} ({self.path})"

    @property
    def variant(self) -> str:
        """Return the name with the values of the axes, and the run unless it is the first."""
        words = [*self.axes.values(), *([] if self.run == 1 else [f"run {self.run}"])]
        return f"{self.name} ({', '.join(words)})" if words else self.name

    @property
    def id(self) -> str:
        """Return the name with the values of the axes, for a test's id."""
        return "-".join((self.name, *self.axes.values()))

    @property
    def spec(self) -> ModelSpec:
        """Return the model; the Subject must have one."""
        assert self.model is not None, f"{self.name} has no model"
        return self.model

    def pin(self) -> Subject:
        """Return a Subject whose model is resolved to a commit. See `ModelSpec.pin`."""
        return replace(self, model=self.spec.pin())

    def to_json(self) -> dict[str, Any]:
        """Return plain data. Arguments that JSON lacks become descriptions, and values of secret variables digests."""
        return {
            "name": self.name,
            "model": None if self.model is None else self.model.to_json(),
            "engine": self.engine,
            "arguments": as_json(self.arguments),
            "environment": {name: secret_digest(name, value) for name, value in sorted(self.environment.items())},
            "path": self.path,
            "axes": dict(self.axes),
            "run": self.run,
            "limits": dict(self.limits),
            "speed": dict(self.speed),
            "tags": list(self.tags),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subject:
        """Create a Subject from the output of `to_json`."""
        model = data["model"]
        return cls(
            **{**data, "model": None if model is None else ModelSpec.from_json(model), "tags": tuple(data["tags"])}
        )


def as_json(value: Any) -> Any:
    """Return plain data that distinguishes arguments of `from_pretrained`, including configuration objects."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_dict"):
        return as_json(value.to_dict())
    return str(value) if type(value).__module__ == "torch" else repr(value)
