"""Tables of the configuration that stand by themselves, and what every table is."""
