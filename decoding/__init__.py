"""How responses are made: sampling, beams, asking in words; on this machine or through a server."""
