"""Published architectures as plain data, to be built with random weights: speed does not depend on what was learnt."""
