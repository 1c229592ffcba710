"""The audio-visual recall task: worlds, rendering, data sets."""
