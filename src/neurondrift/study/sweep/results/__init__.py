"""What a sweep found: the table with a row for each point, group, metric and seed, and what it says over the points."""
