"""The report of a sweep: what many studies say together, as text, figures and a page."""
