"""What users run today, typed again from the formulas: one small file per operation and kind."""
