"""Text from a trained model: sampling, the engine, the command."""
