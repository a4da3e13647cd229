"""The Subject is a value: it travels as JSON and tells what is run."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import MOE_BACKEND, Subject

SERVED = Subject(
    name="org/model",
    model=ModelSpec(name="org/model", revision="abc"),
    engine="sglang",
    arguments={"args": ["--tp", "4"]},
    environment={"B": "2", "A": "1"},
    axes={MOE_BACKEND: "triton", "attention backend": "fa3"},
    limits={"max_mean": 0.05},
    tags=("nvfp4",),
)


def test_it_travels_as_json() -> None:
    assert Subject.from_json(json.loads(json.dumps(SERVED.to_json()))) == SERVED
    local = Subject(name="x", model=ModelSpec(name="x", path=Path("/models/x")), engine="transformers")
    assert Subject.from_json(json.loads(json.dumps(local.to_json()))) == local
    nameless = Subject(name="the kld_candidate fixture")
    assert Subject.from_json(nameless.to_json()) == nameless


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SERVED.name = "another"  # type: ignore[misc]


def test_axes_show_in_label_and_id_in_their_order() -> None:
    assert SERVED.label == "org/model (triton, fa3)"
    assert SERVED.id == "org/model-triton-fa3"
    plain = Subject(name="org/model")
    assert (plain.label, plain.id) == ("org/model", "org/model")


def test_arguments_that_json_lacks_are_described_and_told_apart() -> None:
    def described(value: object) -> object:
        return Subject(name="x", arguments={"a": value}).to_json()["arguments"]["a"]

    assert described(torch.bfloat16) == "torch.bfloat16"
    assert described({"b": (1, Path("c"))}) == {"b": [1, "c"]}
    assert described(SimpleNamespace(to_dict=lambda: {"bits": 4})) == {"bits": 4}
    assert described(range(2)) != described(range(3))


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_values_of_secret_variables_are_digests_that_tell_them_apart(name: str) -> None:
    one, other = (
        Subject(name="x", environment={name: value, "NCCL_ALGO": "Ring"}).to_json()["environment"]
        for value in ("hunter2", "hunter3")
    )
    assert "hunter" not in json.dumps([one, other])
    assert one[name] != other[name]
    assert one["NCCL_ALGO"] == "Ring"
