"""Captures: one model's output at every position of the windows; their format, their recording and their cache."""
