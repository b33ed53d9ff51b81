"""The inputs of sites, as far as measures of a change need them."""
