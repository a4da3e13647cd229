"""The arithmetic: hidden states to logits, logits to figures per position. Pure torch, no files."""
