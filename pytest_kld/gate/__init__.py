"""Limits, verdicts and results. Does not depend on pytest."""
