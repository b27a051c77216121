"""A run is a list of stages, each with named inputs and one folder of output; see `machine`."""
