"""What the diagnostics share: runs of models and guides, densities, weights, moments and scores."""
