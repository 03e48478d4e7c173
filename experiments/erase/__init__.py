"""GEM and its baselines (arXiv 2606.00140): what an erasure takes away, what else it breaks, what it costs."""
