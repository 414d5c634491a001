"""Factors and ranks become files: slices, writes, and measures what was written.

Publishes nothing by itself: it fills the staged folder that `new_output` renames.
"""
