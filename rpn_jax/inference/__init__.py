"""From images and words to labels and scores."""
