"""The hook's description of the server that it runs in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pytest_kld import __version__
from pytest_kld.hook.experts import RoutingDescription
from pytest_kld.hook.head import HeadDescription, HeadPart
from pytest_kld.hook.protocol import HANDSHAKE_FILE, ORIGIN, PROTOCOL, origin, write_json_whole
from pytest_kld.servers.environment import numeric_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDescription:
    """The server that answers. An engine's seams read this from the engine's objects.

    Attributes:
        engine: the engine's name, e.g. `sglang`.
        version: the engine's version.
        device: the device's name.
        model_names: every name under which it serves its model: path, hub id, served name.
        model_class: the architecture's name.
        vocab_size: columns of the logits that are tokens; columns beyond are padding.
        hidden_size: width of the last hidden state.
        dtype: dtype of hidden states and logits, e.g. `bfloat16`.
        quantization: the quantization method's name, or None.
        head: the head's description.
        head_ranks: how many ranks hold a part of the head.
        head_part: returns this rank's part of a plain head; None if it holds none.
        arguments: further settings for the manifest, plain values.
        refusal: why captures of this server would be wrong, in one sentence; None if they are valid.
        routing: how the model routes tokens to experts; None for a dense model.

    """

    engine: str
    version: str
    device: str
    model_names: tuple[str, ...]
    model_class: str
    vocab_size: int
    hidden_size: int
    dtype: str
    quantization: str | None
    head: HeadDescription
    head_ranks: int
    head_part: Callable[[], HeadPart | None]
    arguments: dict[str, Any]
    refusal: str | None = None
    routing: RoutingDescription | None = None


def write_handshake(run: Path, description: ServerDescription) -> None:
    """Write the server's description: versions, model, numerics, head, environment."""
    fields = ServerDescription.__dataclass_fields__
    told = {name: getattr(description, name) for name in fields if name not in ("head", "head_part", "routing")}
    write_json_whole(
        run / HANDSHAKE_FILE,
        {
            **told,
            ORIGIN: origin(),
            "protocol": PROTOCOL,
            "pytest_kld": __version__,
            "torch": str(torch.__version__),
            "environment": numeric_environment(os.environ),
            "head": asdict(description.head),
            "routing": None if description.routing is None else asdict(description.routing),
        },
    )
