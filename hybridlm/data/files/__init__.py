"""Token files, ours and those of other programs, and the stream that they form."""
