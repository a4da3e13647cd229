"""The real vLLM on a CPU: its environment is made once and kept in the user's cache directory."""
