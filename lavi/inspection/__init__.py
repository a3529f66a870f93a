"""Looking inside a model: what an image does to each word, where it looks, which way samples go."""
