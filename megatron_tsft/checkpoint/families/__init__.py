"""Model families as data: one table of names per file."""
