"""What happens to a session: fixtures, gated tests, results, plan."""
