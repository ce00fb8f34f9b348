"""Every method on one table: directions by the KL they close, scores per token, texts; each beside null and random."""
