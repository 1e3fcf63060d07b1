"""Jobs made of several parts: one profile, a grid of profiles, the quickstart."""
