"""The findings with a type: one module for each JSON file of a study's results, for who fills it and who reads it."""
