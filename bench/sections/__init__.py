"""One measurement each: a function from a context to lines."""
