"""The local web page of `omnimem demo-ui`: choose a stream, see what is kept of it, ask at any time.

`app` alone needs the extra `ui`.
"""

LOCAL = ("localhost", "127.0.0.1", "::1")  # names of this machine that no other machine reaches
