"""The tables of the report, one module for each part of the findings."""
