"""What `fastkd train`, `compare` and `report` do: recipes, stages, folders, reports, on the engine of fastkd.train."""
