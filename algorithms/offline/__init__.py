"""Offline RL algorithms, one a file, whose actor is one policy or a chain of them."""
