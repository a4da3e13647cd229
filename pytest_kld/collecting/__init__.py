"""Which tests are gated, of what, which tests a session adds, and what a test sees."""
