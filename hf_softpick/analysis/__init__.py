"""What a trained model does inside: attention and activations, downstream quality, comparison of runs."""
