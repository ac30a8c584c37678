"""What `examples/adult.py` does with its trained models: measure, compare, say, draw, write."""
