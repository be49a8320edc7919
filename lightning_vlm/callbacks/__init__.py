"""Watchers of a run, one per file: what they see they log or draw; they change nothing."""
