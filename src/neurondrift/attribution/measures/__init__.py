"""Every measure as a score: one registry for rows, hidden units and heads, what each needs, and one way to call it."""
