"""What a person looks at: generated text, models side by side, costs, curves."""
