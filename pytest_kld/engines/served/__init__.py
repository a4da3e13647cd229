"""What every served engine shares: servers that are booted, and captures through the hook in them."""
