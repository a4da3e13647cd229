"""Servers as child processes, and leases of GPUs. Nothing here knows of language models or of KLD."""
