"""Text from a saved model, one token after another."""
