"""Names for features and what the names are worth: predictors without a model, and scores from an endpoint."""
