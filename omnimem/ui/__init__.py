"""The local web page of `omnimem demo-ui`: choose a stream, see what is kept of it, ask at any time."""
