"""Teachers, one family per file, or per package that can read a folder (its `recognises` and `read`)."""
