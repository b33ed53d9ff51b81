"""Sets of neurons, weights or hidden units, on arrays: rules that choose them, matched controls, doses, overlap."""
