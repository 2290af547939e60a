"""The predictors and their histories. Each state is defined above the class that creates it."""
