"""What changes a device: clock and power limits under a lease, undone whatever happens to the owner."""
