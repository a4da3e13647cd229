"""A gate whose models are replaced, indistinguishable by size and times, ambiguous, or without a working tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
from safetensors.torch import load_file, save_file

from pytest_kld.subjects.digests import MEMO

if TYPE_CHECKING:
    from conftest import Gate

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
WEIGHTS = "model.safetensors"
LIMIT = "--kld-max-mean=0.1"


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"--kld-cache-dir={tmp_path / 'cache'}"


def copy_with_fixed_times(model: Path, to: Path) -> Path:
    """Copy a model as if unpacked from a reproducible archive: with all times the same."""
    shutil.copytree(model, to)
    for path in to.iterdir():
        os.utime(path, (1, 1))
    return to


def replace_weights(model: Path, other: Path) -> None:
    """Overwrite a model's weights with another model's, of the same size, and restore the times."""
    weights = model / WEIGHTS
    before = weights.stat()
    with weights.open("r+b") as file:
        file.write((other / WEIGHTS).read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("kind", ["sample", "full"])
def test_a_candidate_replaced_with_equal_size_and_times_does_not_pass_with_the_old_figures(
    gate: Gate, broken_dir: Path, tmp_path: Path, cache: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_kld.subjects.digests._RACY_NS", 5 * 10**8)  # remembered after half a second
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    time.sleep(0.6)
    options = (cache, LIMIT, f"--kld-hash={kind}")
    gate(*options, candidates=(model,)).assert_outcomes(passed=1)
    assert str(model / WEIGHTS) in json.loads((tmp_path / "cache" / MEMO).read_text())
    replace_weights(model, broken_dir)
    gate(*options, candidates=(model,)).assert_outcomes(failed=1)


def test_a_replaced_reference_is_captured_anew(gate: Gate, broken_dir: Path, tmp_path: Path, cache: str) -> None:
    model = copy_with_fixed_times(gate.reference, tmp_path / "model")
    gate(cache, LIMIT, f"--kld-ref={model}").assert_outcomes(passed=1)
    replace_weights(model, broken_dir)
    gate(cache, LIMIT, f"--kld-ref={model}").assert_outcomes(failed=1)


def test_candidates_alike_in_names_sizes_and_times_are_measured_apart(
    gate: Gate, broken_dir: Path, tmp_path: Path, cache: str
) -> None:
    good = copy_with_fixed_times(gate.candidate, tmp_path / "a" / "model")
    bad = copy_with_fixed_times(broken_dir, tmp_path / "b" / "model")
    gate(cache, LIMIT, "--kld-json=report.json", candidates=(good, bad)).assert_outcomes(passed=1, failed=1)
    first, second = (result["figures"]["mean"] for result in gate.results())
    assert first < 0.1 < second


def test_a_copy_elsewhere_takes_the_capture_that_is_there(gate: Gate, tmp_path: Path, cache: str) -> None:
    gate(cache, LIMIT).assert_outcomes(passed=1)
    copy = copy_with_fixed_times(gate.candidate, tmp_path / "copy")
    gate(cache, LIMIT, candidates=(copy,)).assert_outcomes(passed=1)
    assert len(list((tmp_path / "cache" / "captures").glob("*/capture.json"))) == 2


def test_a_shard_beside_the_model_is_part_of_it(gate: Gate, broken_dir: Path, tmp_path: Path, cache: str) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    shard = tmp_path / "store" / "shard.safetensors"
    shard.parent.mkdir()
    (model / WEIGHTS).rename(shard)
    names = dict.fromkeys(load_file(shard), "../store/shard.safetensors")
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    gate(cache, LIMIT, candidates=(model,)).assert_outcomes(passed=1)
    shutil.copyfile(broken_dir / WEIGHTS, shard)
    os.utime(shard, (1, 1))
    gate(cache, LIMIT, candidates=(model,)).assert_outcomes(failed=1)


def test_a_model_that_changes_while_it_is_captured_is_an_error_and_leaves_no_capture(
    gate: Gate, broken_dir: Path, tmp_path: Path, cache: str
) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    gate.pytester.makeconftest(f"""
        import shutil
        from transformers import AutoModelForCausalLM
        load = AutoModelForCausalLM.from_pretrained

        def load_and_replace(source, **options):
            network = load(source, **options)
            if source == {str(model)!r}:
                shutil.copyfile({str(broken_dir / WEIGHTS)!r}, {str(model / WEIGHTS)!r})
            return network

        AutoModelForCausalLM.from_pretrained = load_and_replace
    """)
    result = gate(cache, LIMIT, candidates=(model,), subprocess=True)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*CaptureError: the files of *model changed while it was captured*run again*"])
    assert len(list((tmp_path / "cache" / "captures").glob("*/capture.json"))) == 1  # the reference's


@pytest.mark.parametrize("option", ["--kld-ref", "--kld-candidate", "--kld-tokenizer"])
def test_a_directory_that_could_be_a_model_or_a_capture_is_a_usage_error(
    gate: Gate, tmp_path: Path, option: str
) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    (model / "capture.json").write_text("{}")
    result = gate(f"{option}={model}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: {option}: *model could be a model or a capture: it contains config.json and *"]
    )


@pytest.mark.parametrize("name", ["m" * 10_000, "a\0b", "\udcff"], ids=["long", "NUL", "surrogate"])
def test_a_name_that_no_model_can_have_is_a_usage_error(gate: Gate, name: str) -> None:
    result = gate(f"--kld-ref={name}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kld-ref: *"])
    assert "Traceback" not in result.stderr.str()


def test_a_tokenizer_that_does_not_load_is_an_error(gate: Gate, tmp_path: Path, cache: str) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text()[:-100])
    result = gate(cache, LIMIT, candidates=(model,))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*ModelError: the tokenizer of *model (tokenizer.json, tokenizer_config.json) cannot be loaded: *Repair it*"]
    )
    gate(cache, LIMIT, f"--kld-tokenizer={gate.reference}", candidates=(model,)).assert_outcomes(passed=1)
    (model / "tokenizer.json").unlink()  # the remaining files are not a tokenizer either
    result = gate(cache, LIMIT, candidates=(model,))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ModelError: the tokenizer of *model (tokenizer_config.json) cannot be loaded: *"])


def test_a_candidate_without_any_tokenizer_passes_with_a_note(gate: Gate, tmp_path: Path, cache: str) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    result = gate(cache, LIMIT, candidates=(model,))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*model has no tokenizer, so it is unknown whether its token ids mean the same as those of*"]
    )


def test_a_damaged_memo_changes_nothing(gate: Gate, tmp_path: Path, cache: str) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file-digests-1.json").write_text('{"damaged')
    gate(cache, LIMIT, candidates=(model,)).assert_outcomes(passed=1)
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"] = -tensors["lm_head.weight"]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    gate(cache, LIMIT, candidates=(model,)).assert_outcomes(failed=1)


def test_what_a_model_takes_from_elsewhere_is_in_the_json_report(gate: Gate, tmp_path: Path, cache: str) -> None:
    model = copy_with_fixed_times(gate.candidate, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    code = tmp_path / "code"
    code.mkdir()
    (code / "own.py").write_text("")
    config["auto_map"] = {"AutoProcessor": f"{code}--own.Processor"}
    (model / "config.json").write_text(json.dumps(config))
    options = (cache, LIMIT, "--kld-trust-remote-code", "--kld-json=report.json")
    gate(*options, candidates=(model,)).assert_outcomes(passed=1)
    jsonschema.validate(json.loads((gate.path / "report.json").read_text()), SCHEMA)
    identity = gate.results()[0]["about"]["candidate"]["key"]["model"]
    assert identity["hash"] == identity["elsewhere"]["code of AutoProcessor"]["hash"] == "sample"
