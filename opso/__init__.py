"""OPSO: search among dataset states, episodes, and mazes for its diagnostic."""
