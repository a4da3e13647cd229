"""What is measured: models, and what identifies their bits."""
