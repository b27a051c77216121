"""Teachers, one file per family."""
