"""Students for other people's software: stock pipeline folders, LoRA files and single files, each replayed before it is
handed over."""
