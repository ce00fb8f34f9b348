"""What two models say: amplified decoding from blind prefixes, and answers to the same prompts. Nothing is trained."""
