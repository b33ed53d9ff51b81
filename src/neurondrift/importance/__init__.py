"""Which weights matter for what: SNIP, Wanda, Fisher, Taylor, magnitude, random; ActSVD for directions."""
