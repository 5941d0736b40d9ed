"""Zero-shot classification: class lists, text classifiers, scores."""
