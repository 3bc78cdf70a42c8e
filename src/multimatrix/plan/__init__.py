"""What a model costs, stated without torch."""
