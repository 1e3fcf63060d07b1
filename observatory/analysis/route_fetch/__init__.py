"""Route, fetch or local: what each costs, from closed forms whose constants are measured or published."""
