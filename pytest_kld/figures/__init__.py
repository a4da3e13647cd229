"""From two captures to a table of figures per position, and to the figures computed from it."""
