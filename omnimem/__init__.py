"""OmniMem: key-value memory of fixed size for audio-visual LLMs on streams; importing it changes nothing."""
