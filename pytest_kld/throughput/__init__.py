"""Output speed of a served Subject: what the engine's own load generator measures on its server."""
