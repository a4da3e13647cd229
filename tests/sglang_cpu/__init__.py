"""The real SGLang on a CPU: an environment of its own, made once and kept in the user's cache directory."""
