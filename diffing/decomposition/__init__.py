"""Parameter decomposition: a weight, or the change of a weight, as rank-one pieces with a causal importance each."""
