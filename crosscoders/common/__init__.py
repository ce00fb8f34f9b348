"""What every package uses: errors, files, settings on the command line, results."""
