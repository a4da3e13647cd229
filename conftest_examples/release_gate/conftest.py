"""How our servers are started: the reference on eight GPUs, the candidates as they will be served, on four."""

import pytest


@pytest.fixture(scope="session")
def kld_server_args():
    common = ["--attention-backend", "triton", "--mem-fraction-static", "0.85"]
    return {
        "reference": ["--tp", "8", "--kv-cache-dtype", "bfloat16", *common],
        "candidate": ["--tp", "4", "--kv-cache-dtype", "fp8_e4m3", *common],
        "nvidia/Qwen3.5-397B-A17B-NVFP4": ["--quantization", "modelopt_fp4"],
    }
