"""The pytest side: options, collection, fixtures, and the measurement of a session."""
