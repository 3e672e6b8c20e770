"""What a run leaves behind: its folder, its checkpoints, and how it is found again."""
