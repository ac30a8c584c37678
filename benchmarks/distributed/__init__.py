"""Several processes: what a step sends, what that costs, and what sending nothing changes."""
