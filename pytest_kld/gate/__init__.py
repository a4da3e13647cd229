"""Limits, verdicts and results. Knows no pytest."""
