"""How ranks exchange tensors: one interface, and what carries it out (torch, MPI, nothing)."""
