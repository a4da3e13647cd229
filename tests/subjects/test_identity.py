"""The identity of a local model: its contents, at a bounded cost, and nothing that is remembered wrongly."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, MakeModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from pytest_kld.errors import ModelError
from pytest_kld.subjects import digests as digests_module
from pytest_kld.subjects.digests import MEMO, SAMPLED_BYTES, SMALL_BYTES, FileDigests, Hash
from pytest_kld.subjects.identity import model_files
from pytest_kld.subjects.model import ModelSpec

WEIGHTS = "model.safetensors"


def identity(path: Path, kind: Hash = "sample", memo: Path | None = None, **options: Any) -> dict[str, Any]:
    return ModelSpec(name="m", path=path.resolve()).identity(FileDigests(kind=kind, memo=memo), **options)


def overwrite(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file's bytes in place; its size, times and inode stay."""
    before = path.stat()
    contents = bytearray(path.read_bytes())
    change(contents)
    with path.open("r+b") as file:
        file.write(contents)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def flip(contents: bytearray, at: int) -> None:
    contents[at] ^= 1


def bytes_read() -> int:
    """Return the bytes that this process has asked the system to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture(scope="module")
def large_dir(make_model: MakeModel) -> Path:
    """A real model whose one file of weights is large enough to be sampled."""
    path = make_model("large", Qwen3Config(**{**TINY, "hidden_size": 1024, "intermediate_size": 4096}))
    assert (path / WEIGHTS).stat().st_size > SMALL_BYTES
    return path


@pytest.fixture
def small(tmp_path: Path, reference_dir: Path) -> Path:
    """A copy of a tiny model."""
    return Path(shutil.copytree(reference_dir, tmp_path / "small"))


@pytest.fixture
def large(tmp_path: Path, large_dir: Path) -> Path:
    """A copy of a large model."""
    return Path(shutil.copytree(large_dir, tmp_path / "large"))


@pytest.fixture
def memo(tmp_path: Path) -> Path:
    return tmp_path / MEMO


@pytest.fixture
def soon_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are remembered half a second after their last change, so that tests need not wait a minute."""
    monkeypatch.setattr(digests_module, "_RACY_NS", 5 * 10**8)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["sample", "full"])
def test_a_changed_byte_of_a_small_file_changes_it_though_size_and_times_do_not(
    small: Path, name: str, kind: Hash
) -> None:
    before = identity(small, kind)
    overwrite(small / name, lambda contents: flip(contents, len(contents) // 2))
    assert identity(small, kind) != before


def test_code_and_added_files_are_in_it_and_hidden_files_and_documentation_are_not(small: Path) -> None:
    before = identity(small)
    for name in (".gitattributes", ".cache/lock", "README.md", "kl.png", "__pycache__/code.pyc"):
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text("anything")
    assert identity(small) == before
    (small / "modeling_own.py").write_text("x = 1")
    added = identity(small)
    (small / "modeling_own.py").write_text("x = 2")
    assert len({str(found) for found in (before, added, identity(small))}) == 3


def test_a_copy_in_another_place_has_the_same_and_a_renamed_file_another(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile))
    assert identity(copy) == identity(small)
    (copy / "tokenizer.json").rename(copy / "other.json")
    assert identity(copy) != identity(small)


def test_a_requantized_file_is_seen_in_a_sample(large: Path) -> None:
    before = identity(large)
    tensors = load_file(large / WEIGHTS)
    rounded = {name: tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for name, tensor in tensors.items()}
    replaced = large / "replaced"
    save_file(rounded, replaced, metadata={"format": "pt"})
    overwrite(large / WEIGHTS, lambda contents: contents.__setitem__(slice(None), replaced.read_bytes()))
    replaced.unlink()
    assert identity(large) != before


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_norm.weight"])
def test_one_changed_tensor_is_seen_in_a_sample(large: Path, name: str) -> None:
    before = identity(large)
    tensors = load_file(large / WEIGHTS)
    tensors[name] = tensors[name] * 1.01  # a repaired layer, scales of another calibration
    save_file(tensors, large / WEIGHTS, metadata={"format": "pt"})
    assert identity(large) != before


def test_a_single_byte_of_a_large_file_is_seen_only_in_full(large: Path) -> None:
    kinds: tuple[Hash, Hash] = ("sample", "full")
    before = {kind: identity(large, kind) for kind in kinds}
    assert before["sample"]["hash"] == "sample" != before["full"]["hash"]
    assert before["sample"]["local"] != before["full"]["local"]
    read = SMALL_BYTES // 2 + 12_345  # in a large tensor, and in no sampled span of it
    overwrite(large / WEIGHTS, lambda contents: flip(contents, read))
    assert identity(large, "full") != before["full"]
    assert identity(large, "sample") == before["sample"]


def test_shards_behind_a_link_to_a_folder_and_beside_the_model_are_in_it(small: Path, tmp_path: Path) -> None:
    linked, beside = tmp_path / "linked", tmp_path / "beside"
    linked.mkdir()
    beside.mkdir()
    tensors = load_file(small / WEIGHTS)
    (small / WEIGHTS).unlink()
    half = {
        "inside/1.safetensors": dict(list(tensors.items())[:5]),
        "../beside/2.safetensors": dict(list(tensors.items())[5:]),
    }
    (small / "inside").symlink_to(linked, target_is_directory=True)
    for name, part in half.items():
        save_file(part, small / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in half.items() for tensor in part}
    (small / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert {*half} <= {*model_files(small)}
    before = identity(small)
    for shard in (linked / "1.safetensors", beside / "2.safetensors"):
        overwrite(shard, lambda contents: flip(contents, len(contents) - 1))
        assert identity(small) != before
        overwrite(shard, lambda contents: flip(contents, len(contents) - 1))
        assert identity(small) == before


def test_links_into_a_hub_cache_have_the_identity_of_a_plain_copy(small: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(small.iterdir())):
        shutil.copyfile(file, blobs / f"{index:040d}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{index:040d}")
    assert identity(snapshot) == identity(small)


def test_a_link_that_leads_nowhere_is_named(small: Path) -> None:
    link = small / "model-00002.safetensors"
    link.symlink_to("../blobs/missing")
    with pytest.raises(ModelError, match=r"model-00002\.safetensors is a link to \.\./blobs/missing, .*No such file"):
        identity(small)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ModelError, match=r"model-00002\.safetensors is a link .*symbolic links"):
        identity(small)


def test_links_in_a_circle_end_and_special_files_are_left_alone(small: Path) -> None:
    before = identity(small)
    (small / "self").symlink_to(small, target_is_directory=True)
    os.mkfifo(small / "pipe")
    assert identity(small) == before


@pytest.mark.parametrize("claimed", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_that_lies_about_its_length_costs_no_more(tmp_path: Path, claimed: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(claimed.to_bytes(8, "little") + b'{"a":{"data_offsets":[-9,1e999]}}')
        file.truncate(SMALL_BYTES * 4)
    before = bytes_read()
    found = identity(tmp_path)
    assert bytes_read() - before < SAMPLED_BYTES
    overwrite(tmp_path / WEIGHTS, lambda contents: flip(contents, -1))
    assert identity(tmp_path) != found


def test_a_file_of_400_gb_with_very_many_tensors_costs_bounded_reads(tmp_path: Path) -> None:
    tensors, span = 50_000, 8_000_000
    entries = {f"experts.{i}": {"data_offsets": [i * span, (i + 1) * span]} for i in range(tensors)}
    text = json.dumps(entries).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + tensors * span)
    before, began = bytes_read(), time.perf_counter()
    identity(tmp_path)
    read = bytes_read() - before
    print(f"400 GB in one file: {read / 1e6:.0f} MB read in {time.perf_counter() - began:.2f} s")
    assert 4096 * 4096 < read < SAMPLED_BYTES + 100_000


def test_a_model_of_400_gb_costs_bounded_reads(tmp_path: Path) -> None:
    shards, tensors, size = 80, 560, 5 * 10**9
    span = size // tensors
    header = {
        f"model.layers.{i}.weight": {"dtype": "U8", "shape": [span], "data_offsets": [i * span, (i + 1) * span]}
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    for index in range(shards):
        with (tmp_path / f"model-{index:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + tensors * span)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert total > 399 * 10**9
    before, began = bytes_read(), time.perf_counter()
    identity(tmp_path)
    read = bytes_read() - before
    print(f"{total / 1e9:.0f} GB in {shards} files: {read / 1e6:.0f} MB read in {time.perf_counter() - began:.2f} s")
    assert read < shards * 5_000_000


def test_what_is_remembered_is_not_read_again(large: Path, memo: Path, soon_remembered: None, tmp_path: Path) -> None:
    kinds: tuple[Hash, Hash] = ("sample", "full")
    time.sleep(0.6)
    for kind in kinds:
        first = identity(large, kind, memo)
        before = bytes_read()
        assert identity(large, kind, memo) == first
        assert bytes_read() - before < 100_000  # the memo, and folders
    assert identity(large, "sample", memo) != identity(large, "full", memo)
    link = tmp_path / "link"
    link.symlink_to(large, target_is_directory=True)
    before = bytes_read()
    assert identity(link, "sample", memo) == identity(large)
    assert len(json.loads(memo.read_text())) == len(model_files(large))
    before = bytes_read()
    again = ModelSpec(name="m", path=large).identity(FileDigests(memo=memo, fresh=True))
    assert again == identity(large, "sample", memo)
    assert bytes_read() - before > 1_000_000  # --kld-refresh trusts nothing


@pytest.mark.parametrize("how", ["in place", "by a rename"])
def test_a_memo_is_not_trusted_for_a_file_replaced_with_equal_size_and_times(
    large: Path, memo: Path, soon_remembered: None, how: str, tmp_path: Path
) -> None:
    weights = large / WEIGHTS
    time.sleep(0.6)
    first = identity(large, "sample", memo)
    assert str(weights) in json.loads(memo.read_text())
    if how == "in place":
        overwrite(weights, lambda contents: flip(contents, -1))
    else:
        known = weights.stat()
        other = Path(shutil.copyfile(weights, tmp_path / "other"))
        overwrite(other, lambda contents: flip(contents, -1))
        os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
        other.replace(weights)
    changed = identity(large, "sample", memo)
    assert changed != first
    assert changed == identity(large)


def test_a_file_that_changed_just_now_is_not_remembered(small: Path, memo: Path) -> None:
    """Within the resolution of a file system's clock a second change would leave the same times."""
    identity(small, "sample", memo)
    assert not memo.exists()
    os.utime(small / WEIGHTS, (1, 1))  # an old time of modification proves nothing
    identity(small, "sample", memo)
    assert not memo.exists()


@pytest.mark.parametrize("damage", ["", "[]", "{", "[" * 100_000, '{"%s": 3}', '{"%s": {"status": 1, "full": 2}}'])
def test_a_damaged_memo_is_ignored_and_replaced(small: Path, memo: Path, soon_remembered: None, damage: str) -> None:
    time.sleep(0.6)
    memo.write_text(damage.replace("%s", str(small / WEIGHTS)))
    assert identity(small, "sample", memo) == identity(small)
    assert json.loads(memo.read_text())[str(small / WEIGHTS)]["full"]


def test_a_wrong_digest_of_the_right_form_is_dropped_when_the_file_changes(
    small: Path, memo: Path, soon_remembered: None
) -> None:
    time.sleep(0.6)
    expected = identity(small, "sample", memo)
    entries = json.loads(memo.read_text())
    for changed in range(5):  # size, mtime, ctime, inode, device
        altered = {**entries, str(small / WEIGHTS): {"status": list(entries[str(small / WEIGHTS)]["status"])}}
        altered[str(small / WEIGHTS)]["status"][changed] += 1
        altered[str(small / WEIGHTS)]["full"] = "0" * 64
        memo.write_text(json.dumps(altered))
        assert identity(small, "sample", memo) == expected


def test_processes_at_once_leave_a_whole_memo(small: Path, memo: Path, soon_remembered: None) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from pytest_kld.subjects import digests; digests._RACY_NS = 0\n"
        "paths = sorted(Path(sys.argv[1]).iterdir())\n"
        "for _ in range(20):\n"
        "    digests.FileDigests(memo=Path(sys.argv[2]), fresh=True).of(paths)\n"
    )
    time.sleep(0.6)
    running = [subprocess.Popen([sys.executable, "-c", code, str(small), str(memo)]) for _ in range(3)]
    while any(process.poll() is None for process in running):
        if memo.exists():
            json.loads(memo.read_text())
        time.sleep(0.01)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(json.loads(memo.read_text())) == len(list(small.iterdir()))
    assert not list(memo.parent.glob("*.tmp"))


def test_a_memo_that_cannot_be_written_costs_only_time(small: Path, tmp_path: Path, soon_remembered: None) -> None:
    (tmp_path / "file").write_text("")
    time.sleep(0.6)
    assert identity(small, "sample", tmp_path / "file" / MEMO) == identity(small)


@pytest.mark.parametrize("absolute", [True, False])
def test_the_base_of_an_adapter_is_part_of_it(
    small: Path, candidate_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    base = Path(shutil.copytree(candidate_dir, tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    config = {"base_model_name_or_path": str(base) if absolute else "base"}
    (small / "adapter_config.json").write_text(json.dumps(config))
    before = identity(small)
    overwrite(base / WEIGHTS, lambda contents: flip(contents, -1))
    assert identity(small) != before
    assert identity(small)["local"] == before["local"]


def test_a_base_that_names_itself_or_is_nowhere_is_no_obstacle(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain = identity(small)
    config = small / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(small)}))
    assert identity(small)["elsewhere"] == {}
    config.write_text(json.dumps({"base_model_name_or_path": "org/nowhere"}))
    assert identity(small)["elsewhere"] == {"base model": {"hub": "org/nowhere", "commit": None, "elsewhere": {}}}
    for damaged in ("{", "[]", '{"base_model_name_or_path": 3}'):
        config.write_text(damaged)
        assert identity(small)["local"] != plain["local"]


def test_code_of_another_directory_is_part_of_it_if_it_may_run(small: Path, tmp_path: Path) -> None:
    code = tmp_path / "code" / "modeling_own.py"
    code.parent.mkdir()
    code.write_text("x = 1")
    config = json.loads((small / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{code.parent}--modeling_own.Model"}
    (small / "config.json").write_text(json.dumps(config))
    trusted, untrusted = identity(small, trust_remote_code=True), identity(small)
    code.write_text("x = 2")
    assert identity(small, trust_remote_code=True) != trusted
    assert identity(small) == untrusted
