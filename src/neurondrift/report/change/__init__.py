"""What the change does, in the report: H1 or H2 or undecided, and the tables that this rests on."""
