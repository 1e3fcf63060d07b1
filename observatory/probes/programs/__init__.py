"""What watches the models of programs that were not written for it (``observatory run``)."""
