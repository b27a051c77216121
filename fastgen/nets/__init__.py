"""Networks that no library keeps for us."""
