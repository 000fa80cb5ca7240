"""The commands of `mechvlm` that are more than a call: what they take, run and write.

Rule this package guards: every command leaves a record from which it can be run again, and refuses in one sentence.
"""
