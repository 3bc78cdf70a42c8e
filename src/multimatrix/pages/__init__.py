"""What pages have in common: their frame, their tables and how their figures look."""
