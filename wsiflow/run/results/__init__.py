"""What a run ends with: scores, costs, tables, its report and its record."""
