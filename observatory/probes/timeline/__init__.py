"""What is timed: marks on device streams, and one log of the exchanges and spans between them."""
