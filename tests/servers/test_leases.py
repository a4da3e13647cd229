"""GPUs are leased: never to two holders at a time, all that are needed or none, and free when the holder dies."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nvidia_smi import put_on_path

from pytest_kld.errors import ServerError
from pytest_kld.servers.leases import lease, lease_device, only_by_name, visibility, visible_gpus

GPUS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
HOLD = """
import sys, time
from pathlib import Path
from pytest_kld.servers.leases import lease
with lease(int(sys.argv[1]), tuple(sys.argv[3].split(",")), Path(sys.argv[2])) as held:
    print(",".join(held), flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(count: int, directory: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Another process that holds some GPUs, and which GPUs it holds."""
    command = [sys.executable, "-c", HOLD, str(count), str(directory), ",".join(GPUS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            yield other, other.stdout.readline().strip().split(",")
        finally:
            other.kill()


def test_another_process_gets_the_gpus_that_are_left(tmp_path: Path) -> None:
    with held_elsewhere(3, tmp_path) as (_, theirs), lease(1, GPUS, tmp_path) as ours:
        assert len(theirs) == 3
        assert not set(ours) & set(theirs)


def test_a_lease_waits_for_enough_and_takes_them_from_the_dead(tmp_path: Path) -> None:
    waited = threading.Event()
    with held_elsewhere(3, tmp_path) as (other, _):
        killer = threading.Thread(target=lambda: (waited.wait(20), other.kill()))
        killer.start()
        with lease(2, GPUS, tmp_path, waited.set) as ours:
            assert waited.is_set()
            assert len(set(ours)) == 2
        killer.join()


def test_a_waiting_lease_holds_none_meanwhile(tmp_path: Path) -> None:
    with lease(3, GPUS, tmp_path):
        waiting = threading.Event()
        entered = threading.Event()

        def want_two() -> None:
            with lease(2, GPUS, tmp_path, waiting.set):
                entered.set()

        thread = threading.Thread(target=want_two, daemon=True)
        thread.start()
        assert waiting.wait(10)
        time.sleep(0.1)
        with lease(1, GPUS, tmp_path):
            assert not entered.is_set()
    thread.join(20)
    assert entered.is_set()


def test_more_than_there_are_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="needs 8 GPUs, but 4 are visible"), lease(8, GPUS, tmp_path):
        pass


def test_visible_gpus_follow_the_environment() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-x, GPU-y"}) == ("GPU-x", "GPU-y")


UUIDS = ("GPU-11aa", "GPU-22bb", "GPU-22cc", "GPU-33dd")


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_on_path(tmp_path, monkeypatch, *UUIDS)


@pytest.mark.usefixtures("four_gpus")
def test_gpus_are_named_by_uuid_whichever_way_they_were_chosen() -> None:
    assert visible_gpus({}) == UUIDS
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,1"}) == ("GPU-33dd", "GPU-22bb")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-33, GPU-22bb,GPU-22"}) == ("GPU-33dd", "GPU-22bb", "GPU-22")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,-1,3"}) == ("GPU-22cc",)


@pytest.mark.usefixtures("four_gpus")
def test_a_child_is_shown_gpus_by_number_in_the_order_of_the_bus() -> None:
    assert visibility(("GPU-33dd", "GPU-22bb")) == {"CUDA_VISIBLE_DEVICES": "3,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert not only_by_name(UUIDS)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("name", ["MIG-5f-1/2/0", "GPU-of-another-container"])
def test_what_has_no_number_keeps_its_name(name: str) -> None:
    (gpu,) = visible_gpus({"CUDA_VISIBLE_DEVICES": name})
    assert visibility((gpu,)) == {"CUDA_VISIBLE_DEVICES": name}
    assert only_by_name((gpu,))


def test_numbers_stay_numbers_where_there_is_no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert visibility(visible_gpus({"CUDA_VISIBLE_DEVICES": "2,0"}))["CUDA_VISIBLE_DEVICES"] == "2,0"


@pytest.mark.usefixtures("four_gpus")
def test_a_comparison_holds_the_gpu_behind_its_device(tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "2,GPU-11aa"}
    with lease_device("cuda:1", environment, tmp_path) as gpu:
        assert gpu == "GPU-11aa"
        others: list[str] = []
        with lease(3, UUIDS, tmp_path) as left:
            others += left
        assert sorted(others) == sorted(set(UUIDS) - {"GPU-11aa"})
    with lease_device("cuda", environment, tmp_path) as gpu:
        assert gpu == "GPU-22cc"
    with lease(4, UUIDS, tmp_path) as all_of_them:
        assert len(all_of_them) == 4
    with lease_device("cpu", environment, tmp_path) as gpu:
        assert gpu is None


@pytest.mark.usefixtures("four_gpus")
def test_a_comparison_waits_for_a_server_of_another_session(tmp_path: Path) -> None:
    waited = threading.Event()
    with held_elsewhere(4, tmp_path) as (other, _):
        killer = threading.Thread(target=lambda: (waited.wait(20), other.kill()))
        killer.start()
        with lease_device("cuda:0", {"CUDA_VISIBLE_DEVICES": GPUS[0]}, tmp_path, waited.set) as gpu:
            assert waited.is_set()
            assert gpu == GPUS[0]
        killer.join()
