"""What predicts: a history, and what is made of it. Each state stands above the class that makes it."""
