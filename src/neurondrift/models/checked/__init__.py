"""Loading that says what it loaded: every tensor has its place, or it is an error."""
