"""What the user asked for: options, ini keys, engines and Subjects."""
