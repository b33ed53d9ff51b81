"""How well scores find members of which it is known that they are right."""
