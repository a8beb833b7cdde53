"""Running an experiment: command line, a run and its directory, metrics, evaluation, plots, the chain's loop."""
