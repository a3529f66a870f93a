"""Lightning callbacks that a recipe can name."""
