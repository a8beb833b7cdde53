"""OPSO: search among dataset states, batches, episodes, trained policies, and mazes for its diagnostic."""
