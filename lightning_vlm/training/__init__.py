"""What a training step is made of: the loss's divisor, optimizer groups, freezing, scores."""
