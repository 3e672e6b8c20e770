"""What a run needs before it is started: its memory by part, the micro-batch that fits, and what it will cost."""
