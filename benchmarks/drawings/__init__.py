"""A benchmark that anyone can rebuild: one word, drawn by many hands."""
