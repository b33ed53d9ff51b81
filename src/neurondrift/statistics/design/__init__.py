"""Who is compared with whom, and with what weights: strata, balancing, designs, and the ratios that follow."""
