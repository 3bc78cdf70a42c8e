"""A fair comparison: match, run every variant and seed, tables, figures, report."""
