"""Things that move tokens between ranks."""
