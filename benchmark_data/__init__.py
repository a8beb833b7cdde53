"""What stands behind make_dataset.py and train_expert.py: expert policies, recipes, checks."""
