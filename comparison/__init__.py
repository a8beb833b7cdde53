"""Tables of results: the runs of each, their raw scores, and the tables made from them."""
