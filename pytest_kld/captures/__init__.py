"""Captures: what one model said about every position of the windows; their format, their making, their cache."""
