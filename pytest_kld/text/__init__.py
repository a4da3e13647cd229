"""Text, token ids, windows."""
