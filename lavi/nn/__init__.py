"""Small pure-torch modules; they know nothing of any model family."""
