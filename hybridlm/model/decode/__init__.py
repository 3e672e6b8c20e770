"""One token of every row through the whole model, with nothing in it that only longer texts need."""
