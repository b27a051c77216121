"""Training of TRELLIS's autoencoders on solids whose distances are known: a package, for these are no methods."""
