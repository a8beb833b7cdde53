"""What stands behind make_dataset.py: expert policies, recipes, checks."""
