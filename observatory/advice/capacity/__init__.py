"""How many devices serve a model at given targets, in which set-up, and what rules out the others."""
