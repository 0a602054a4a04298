"""Runs a stored model over every node of a stored graph, layer by layer and part by part (`run.infer_nodes`)."""
