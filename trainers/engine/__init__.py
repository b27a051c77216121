"""The training loop and what it owns: optimisers, averages, checkpoints, monitors, ranks."""
