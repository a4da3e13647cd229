"""Two captures to a table of figures per position, and what is drawn from it."""
