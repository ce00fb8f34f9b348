"""Both models of a run, live: what a prompt makes them do, in Python and on a local page."""
