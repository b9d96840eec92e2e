"""Results of a run: scores, costs, tables, the report and the record in MLflow."""
