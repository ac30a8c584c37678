"""What a step costs on a GPU, in one run of minutes."""
