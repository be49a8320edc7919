"""Rows -> planned, resumable, collated batches: sources, formats, plan, loader."""
