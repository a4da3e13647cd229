"""A stand-in: without an accelerator SGLang imports vllm._custom_ops and never calls it."""
