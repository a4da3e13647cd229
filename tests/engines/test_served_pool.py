"""What is asked of the place where SGLang runs, before anything boots there."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from made import made_result
from nvidia_smi import put_on_path
from scripted_sglang import GOOD, make_pool, started
from sglang_cpu.releases import CUSTOM_ALL_REDUCE, unpack

from pytest_kld import __version__
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import ServerError
from pytest_kld.hook.protocol import PROTOCOL
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject


def pool_that_is_told(told: object, tmp_path: Path) -> ServerPool:
    """A pool whose interpreter answers the question with the given text and can do nothing else."""
    interpreter = tmp_path / "python"
    text = told if isinstance(told, str) else json.dumps(told)
    interpreter.write_text(f"#!/bin/sh\necho 'a banner'\ncat <<'END'\n{text}\nEND\n")
    interpreter.chmod(0o755)
    return make_pool(tmp_path, (str(interpreter), *KIND.launch))


def test_versions_and_devices_are_asked_for_once(tmp_path: Path) -> None:
    pool = pool_that_is_told(GOOD, tmp_path)
    told = pool.installed({})
    assert (told.versions, told.devices) == ({"sglang": "0.5.23"}, ("NVIDIA H100",))
    Path(pool.command[0]).unlink()
    assert pool.installed({}) is told


def test_a_hook_of_another_version_is_refused_and_both_are_named(tmp_path: Path) -> None:
    pool = pool_that_is_told({**GOOD, "pytest_kld": "9.9.9", "protocol": 7}, tmp_path)
    told = r"pytest-kld 9\.9\.9 \(protocol 7\) is installed where SGLang runs"
    with pytest.raises(ServerError, match=told) as caught:
        pool.installed({})
    assert f"{__version__} (protocol {PROTOCOL})" in str(caught.value)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({**GOOD, "versions": {}}, "has no SGLang"),
        ({**GOOD, "hooked": False, "why_not": "run pytest-kld patch --apply"}, "run pytest-kld patch --apply"),
        ("no JSON", "Install pytest-kld where SGLang runs"),
    ],
)
def test_what_is_missing_is_an_error_before_a_boot(told: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=words):
        pool_that_is_told(told, tmp_path).installed({})


def test_an_interpreter_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    pool = pool_that_is_told(GOOD, tmp_path)
    Path(pool.command[0]).unlink()
    with pytest.raises(ServerError, match="does not run") as caught:
        pool.installed({})
    assert str(tmp_path / "python") in str(caught.value)
    assert "--kld-sglang-command" in str(caught.value)


def test_flags_are_completed_and_what_the_user_gives_wins(tmp_path: Path) -> None:
    pool = pool_that_is_told(GOOD, tmp_path)
    assert pool.complete(["--tp", "2"], {}) == ["--tp", "2", "--prefill-max-requests", "1"]
    for given in (["--prefill-max-requests", "4"], ["--prefill-max-r", "4"]):
        assert pool.complete(given, {}) == given
    with pytest.raises(ServerError, match="--port cannot be given"):
        pool.complete(["--port", "1"], {})


def test_flags_are_checked_by_the_spellings_of_the_release_that_is_installed(tmp_path: Path) -> None:
    options = {"--spread": ["--spread", "attn_dp_size"]}
    pool = pool_that_is_told({**GOOD, "options": options}, tmp_path)
    with pytest.raises(ServerError, match=r"--spr, short for --spread, cannot be given: with data-parallel attention"):
        pool.complete(["--spr", "2"], {})


def fingerprint(tmp_path: Path, *args: str, trust: bool = False, **env: str) -> dict[str, Any]:
    pool = pool_that_is_told(GOOD, tmp_path)
    pool.settings = Settings(trust_remote_code=trust)
    engine = ServedEngine(servers=pool, capture_dir=tmp_path / "spool", api_key=None)
    subject = Subject(name="org/model", model=ModelSpec(name="org/model"), arguments={"args": args}, environment=env)
    return engine.fingerprint(subject)


def test_an_inherited_variable_of_the_engine_is_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(tmp_path)
    for name in ("SGLANG_X", "NCCL_ALGO", "FLASHINFER_X", "TORCH_X", "NVIDIA_TF32_OVERRIDE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            after = fingerprint(tmp_path)
        assert after["environment"] == {**before["environment"], name: "1"}
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert fingerprint(tmp_path) == before


def test_a_given_variable_is_in_the_fingerprint_whatever_its_name_and_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_X", "1")
    given = fingerprint(tmp_path, SGLANG_X="2", MY_SWITCH="on", MY_API_KEY="hunter2")["environment"]
    assert (given["SGLANG_X"], given["MY_SWITCH"]) == ("2", "on")
    other = fingerprint(tmp_path, SGLANG_X="2", MY_SWITCH="on", MY_API_KEY="hunter3")["environment"]
    assert given["MY_API_KEY"] != other["MY_API_KEY"]
    assert "hunter" not in str(given)


def test_graphs_and_remote_code_are_in_the_fingerprint(tmp_path: Path) -> None:
    plain = fingerprint(tmp_path)
    assert fingerprint(tmp_path, "--disable-cuda-graph") != plain
    assert fingerprint(tmp_path, "--cuda-graph-bs", "1", "2") != plain
    assert fingerprint(tmp_path, trust=True) != plain


MODEL = ModelSpec(name="org/model")
UUIDS = ("GPU-11aa", "GPU-22bb", "GPU-33cc", "GPU-44dd")


def test_a_booted_server_is_shown_its_gpus_by_number_and_leases_them_by_uuid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, monkeypatch, *UUIDS)
    monkeypatch.setattr("pytest_kld.engines.served.pool.lease_directory", lambda: tmp_path)
    pool = make_pool(tmp_path)
    try:
        handle = pool.get(MODEL, ["--tp", "2"], {"CUDA_VISIBLE_DEVICES": "GPU-44dd,1"})
        told = started(pool)
    finally:
        pool.close()
    assert handle.gpus == ("GPU-44dd", "GPU-22bb")
    shown = told["environment"]["CUDA_VISIBLE_DEVICES"]
    assert shown == "3,1"
    assert told["environment"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    for release in ("0.5.9", "0.5.15.post1"):
        assert sglang_parses(unpack(release, tmp_path / release), shown) == [3, 1]
        with pytest.raises(ValueError, match="invalid literal"):
            sglang_parses(tmp_path / release, "GPU-44dd,GPU-22bb")


def sglang_parses(packages: Path, shown: str) -> list[int]:
    """Run the lines of SGLang's own all-reduce that read CUDA_VISIBLE_DEVICES."""
    for path in sorted((packages / CUSTOM_ALL_REDUCE).parent.glob("custom_all_reduce*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and ast.unparse(node).startswith("if cuda_visible_devices:\n    device_ids ="):
                names: dict[str, Any] = {"cuda_visible_devices": shown}
                exec(compile(ast.Module(body=node.body, type_ignores=[]), str(path), "exec"), names)
                return list(names["device_ids"])
    raise AssertionError("this release reads CUDA_VISIBLE_DEVICES in another way")


def test_gpus_that_have_only_a_name_are_passed_on_and_the_reports_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, monkeypatch, *UUIDS)
    whole = fingerprint(tmp_path, "--tp", "2")
    assert whole["notes"] == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    sliced = fingerprint(tmp_path, "--tp", "2")
    assert ["custom all-reduce is off" in note for note in sliced["notes"]] == [True]
    assert fingerprint(tmp_path, "--tp", "1")["notes"] == []
    about = {"reference": {"key": {"engine": sliced}}, "candidate": {"key": {"engine": whole}}}
    (note,) = made_result("candidate", about={**about, "protocol": {}}).notes
    assert note.startswith("the reference: the GPUs are visible by UUID only")


CHUNKS = {
    "SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK": "1",
    "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE": "256",
    "SGLANG_LOGPROB_CHUNK_SIZE": "256",
}


def test_sglang_makes_its_own_log_probs_in_chunks_unless_it_was_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(tmp_path)
    try:
        pool.get(MODEL, ["--device", "cpu"], {})
        assert CHUNKS.items() <= started(pool)["environment"].items()
        pool.get(MODEL, ["--device", "cpu"], {"SGLANG_LOGPROB_CHUNK_SIZE": "1024"})
        told = started(pool)["environment"]
    finally:
        pool.close()
    assert {name: value for name, value in told.items() if name in CHUNKS} == {"SGLANG_LOGPROB_CHUNK_SIZE": "1024"}
    assert CHUNKS.items() <= fingerprint(tmp_path)["environment"].items()
    monkeypatch.setenv("SGLANG_LOGITS_PROCESSER_CHUNK_SIZE", "512")
    inherited = fingerprint(tmp_path)["environment"]
    assert {name: value for name, value in inherited.items() if name in CHUNKS} == {
        "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE": "512"
    }


def test_servers_in_use_stay_when_another_needs_a_place_and_idle_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, monkeypatch, "GPU-11aa", "GPU-22bb")
    monkeypatch.setattr("pytest_kld.engines.served.pool.lease_directory", lambda: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pool = make_pool(tmp_path)
    first, second, third = (ModelSpec(name=f"org/{name}") for name in ("first", "second", "third"))
    try:
        with pool.using(first, [], {}) as one, ThreadPoolExecutor(2) as threads:
            booting = [threads.submit(pool.get, model, [], {}) for model in (second, third)]
            others = [each.result(timeout=60) for each in booting]
            assert pool.handles[0] == one
            assert pool.handles[1] in others  # whichever booted last
            assert len(pool.handles) == 2
            assert one.gpus != pool.handles[1].gpus
            assert len({handle.log for handle in (one, *others)}) == 3
            pool.close()
            assert pool.handles == [one]
            pool.release(first, [], {})
            assert pool.handles == [one]
        pool.release(first, [], {})
        assert pool.handles == []
    finally:
        pool.close(in_use=True)
