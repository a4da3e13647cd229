"""vLLM servers: their flags, requests and known failures. The code inside the servers is `pytest_kld.hook.vllm`."""
