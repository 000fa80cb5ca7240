"""The loopback server's own code: it imports nnsight and the standard library, and runs where mechvlm is not."""
