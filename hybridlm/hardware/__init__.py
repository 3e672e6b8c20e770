"""The machine: what it is (device), what profiles say of a card (profiles), how fast it multiplies (rates), and what a run makes of it."""
