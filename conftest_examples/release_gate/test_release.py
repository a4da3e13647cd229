"""The tests that a checkpoint must pass before it is released. The models and two limits are in pytest.ini."""

import pytest


@pytest.mark.kld(min_top1=0.9, max_ppl_ratio=1.02)
def test_checkpoint_is_fit_for_release():
    """The limits in pytest.ini apply as well."""


def test_tail_is_in_proportion(kld):
    assert kld.p99 < 30 * kld.mean
    assert kld.max < 10


def test_the_server_answers_sensibly(kld, kld_server):
    import requests

    server = kld_server(kld.candidate)
    body = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    answer = requests.post(f"{server.url}/generate", json=body, timeout=120)
    answer.raise_for_status()
    assert answer.json()["text"].strip()
