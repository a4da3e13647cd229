"""Real SGLang servers: their flags, requests and faults. What runs inside them is `pytest_kld.hook.sglang`."""
