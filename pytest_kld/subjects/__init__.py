"""What is measured: models, and the identity of their contents."""
