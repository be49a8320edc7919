"""Weights and configs on disk: where they come from and what their tensors are called."""
