"""Tensor functions that training time is spent in: each a readable truth, beside it the fast path."""
