"""The audio-visual recall task: worlds and their rendering."""
