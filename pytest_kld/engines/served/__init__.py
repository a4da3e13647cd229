"""What all served engines share: booting servers, and capturing through the hook inside them."""
